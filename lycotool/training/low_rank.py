"""A layer's product with ``W + up @ down``, with as few kernels as that takes.

Left to itself, autograd adds the small product to the large one in a kernel of its own, and once
more the two gradients of the input. Each sum can be the end of a matrix product instead, which
has to write its result anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lycotool.training.gradients import gradients_of_product

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.linalg.low_rank import LowRank


def product_with_low_rank(
    layer: TrainableLayer, x: Tensor, weight: Tensor, low: LowRank, bias: Tensor | None
) -> Tensor:
    """``op(x, W + up @ down) + b``, without the sum; differentiable in x and the factors.

    The factors are cast to the input's dtype.
    """
    is_plain = low.core is None and layer.groups == 1 and not isinstance(layer.padding, str)
    if not is_plain or torch.compiler.is_compiling():  # a compiler joins sums by itself
        return layer.apply(x, weight, bias) + layer.low_rank(x, low)
    up, down = low.up.to(x.dtype), low.down.to(x.dtype)
    form = _Linear if layer.kind == "linear" else _Convolution
    return cast("Tensor", cast("Any", form).apply(x, up, down, weight, bias, layer))


class _Linear(torch.autograd.Function):
    """``x Wᵀ + b + (x downᵀ) upᵀ``; W and b have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        up: Tensor,
        down: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
    ) -> Tensor:
        y = layer.apply(x, weight, bias)
        narrow = x.flatten(0, -2) @ down.T
        _rows(y).addmm_(narrow, up.T)
        ctx.save_for_backward(x, narrow, up, down, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (gradient,) = gradients
        x, narrow, up, down, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        back = rows @ up  # to the narrow product
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ weight.to(gradient.dtype)
            _rows(dx).addmm_(back, down)
        return dx, rows.T @ narrow, back.T @ x.flatten(0, -2), None, None, None


class _Convolution(torch.autograd.Function):
    """``x * W + b + up (x * down)``; W and b have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        up: Tensor,
        down: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
    ) -> Tensor:
        down = down.reshape(-1, *weight.shape[1:])
        y = layer.apply(x, weight, bias)
        narrow = layer.apply(x, down)
        _add_product(y, narrow, up.T)
        ctx.layer = layer
        ctx.save_for_backward(x, narrow, up, down, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (gradient,) = gradients
        x, narrow, up, down, weight = ctx.saved_tensors
        layer: TrainableLayer = ctx.layer
        back = layer.pointwise(gradient, up.T)
        wanted = ctx.needs_input_grad[0]
        low_dx, d_down = gradients_of_product(layer, back, x, down, for_input=wanted)
        base = weight.to(x.dtype)
        dx, _ = gradients_of_product(layer, gradient, x, base, for_input=wanted, for_weight=False)
        d_up = layer.rows(gradient) @ layer.rows(narrow).T
        total = None if dx is None or low_dx is None else dx.add_(low_dx)
        return total, d_up, None if d_down is None else d_down.flatten(1), None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """Every position a row: a view, because the tensor was made just now."""
    return tensor.view(-1, tensor.shape[-1])


def _add_product(y: Tensor, narrow: Tensor, matrix: Tensor) -> None:
    """``y += narrow @ matrix`` over the channels, in place."""
    wide, thin = y.movedim(1, -1), narrow.movedim(1, -1)
    if wide.is_contiguous():  # channels last: the product writes to where the sum is
        _rows(wide).addmm_(thin.reshape(-1, thin.shape[-1]), matrix)
    else:
        y.add_((thin @ matrix).movedim(-1, 1))
