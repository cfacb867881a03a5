"""A layer's product with ``W + first ⊗ second``, without moving the input's channels.

Multiplying by the two factors in turn takes few multiply-adds, but the input's channels must be
reordered between them. On a GPU that takes longer than a product with ΔW, which is built in the
input's dtype for the forward pass and again for the backward pass, so that no layer keeps one.

Where ``second = up @ down`` is thin there is no need for either: a linear layer's input is ``c``
runs of ``d`` channels one after another, so that ``down`` meets each of them as a row of a view,
``first`` what is left of them, ``c`` runs of the rank, and ``up`` the runs of the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lycotool.linalg.low_rank import kron
from lycotool.training.gradients import gradients_of_product

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.linalg.low_rank import LowRank


def product_with_kronecker(
    layer: TrainableLayer, x: Tensor, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``op(x, W + first ⊗ second) + b``, differentiable in x and both factors.

    ``W + ΔW`` is rounded only in the gradient of the input, where every operand is.

    Parameters
    ----------
    first, second
        ``(a, c)`` and ``(b, d·kernel)``; cast to the input's dtype.
    """
    factors = first.to(x.dtype), second.to(x.dtype)
    return cast("Tensor", cast("Any", _Product).apply(x, *factors, weight, bias, layer))


class _Product(torch.autograd.Function):
    """W and the bias have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        first: Tensor,
        second: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, first, second, weight)
        change = kron(first, second)
        y = layer.apply(x, weight, bias)
        if layer.kind == "linear":
            y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), change.T)
            return y
        return y.add_(layer.apply(x, change.reshape(weight.shape)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (gradient,) = gradients
        x, first, second, weight = ctx.saved_tensors
        total = weight.to(x.dtype) + kron(first, second).reshape(weight.shape)
        dx, change = gradients_of_product(ctx.layer, gradient, x, total, for_input=ctx.needs_input_grad[0])
        if change is None:
            raise TypeError("a weight's gradient was asked for")
        # ΔW[(a, b), (c, d)] = first[a, c]·second[b, d]
        (a, c), (b, d) = first.shape, second.shape
        by_factor = change.reshape(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)
        d_first = (by_factor @ second.reshape(-1)).view(a, c)
        d_second = (first.reshape(-1) @ by_factor).view(b, d)
        return dx, d_first, d_second, None, None, None


def product_with_thin_kronecker(
    layer: TrainableLayer, x: Tensor, low: LowRank, mixing: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``op(x, W + first ⊗ (up @ down)) + b`` of a linear layer, differentiable in x and all factors.

    Parameters
    ----------
    low
        ``up`` and ``down``, ``(b, r)`` and ``(r, d)``; cast to the input's dtype, as `mixing` is.
    mixing
        ``firstᵀ ⊗ I``, ``(c·r, a·r)``.
    """
    factors = low.up.to(x.dtype), low.down.to(x.dtype), mixing.to(x.dtype)
    return cast("Tensor", cast("Any", _Thin).apply(x, *factors, weight, bias, layer))


class _Thin(torch.autograd.Function):
    """W and the bias have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        up: Tensor,
        down: Tensor,
        mixing: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
    ) -> Tensor:
        (outputs, rank), inputs = up.shape, down.shape[1]
        y = layer.apply(x, weight, bias)
        narrow = (x.reshape(-1, inputs) @ down.T).view(-1, len(mixing))
        mixed = narrow @ mixing
        y.view(-1, outputs).addmm_(mixed.view(-1, rank), up.T)
        ctx.save_for_backward(x, narrow, mixed, up, down, mixing, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (gradient,) = gradients
        x, narrow, mixed, up, down, mixing, weight = ctx.saved_tensors
        (outputs, rank), inputs = up.shape, down.shape[1]
        runs = gradient.reshape(-1, outputs)
        back = (runs @ up).view(-1, mixing.shape[1])  # to what was mixed
        inner = (back @ mixing.T).view(-1, rank)  # to the narrow product
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ weight.to(gradient.dtype)
            dx.view(-1, inputs).addmm_(inner, down)
        d_down = inner.T @ x.reshape(-1, inputs)
        return dx, runs.T @ mixed.view(-1, rank), d_down, narrow.T @ back, None, None, None
