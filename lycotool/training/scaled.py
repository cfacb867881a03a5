"""A linear layer's product with DoRA's weight, with as few kernels as that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.linalg.low_rank import LowRank


def scaled_product_with_low_rank(
    layer: TrainableLayer,
    x: Tensor,
    weight: Tensor,
    low: LowRank,
    gain: Tensor,
    bias: Tensor | None,
    *,
    kernels: bool = False,
) -> Tensor:
    """``(1 + gain) ∘ op(x, W + up @ down) + b`` of a linear layer, without the sum of the weights.

    Differentiable in x, the factors and the gain of each row of W; all are cast to the input's dtype.

    Parameters
    ----------
    kernels
        Whether Triton's are used.
    """
    operands = low.up.to(x.dtype), low.down.to(x.dtype), gain.to(x.dtype)
    return cast("Tensor", cast("Any", _Scaled).apply(x, *operands, weight, bias, layer, kernels))


class _Scaled(torch.autograd.Function):
    """W and the bias have no gradient. Of the output, which later layers keep too, the gain's is made."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        up: Tensor,
        down: Tensor,
        gain: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
        kernels: bool,
    ) -> Tensor:
        ctx.kernels = kernels
        y = layer.apply(x, weight)
        narrow = x.flatten(0, -2) @ down.T
        y.view(-1, y.shape[-1]).addmm_(narrow, up.T)
        y.addcmul_(y, gain)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, narrow, up, down, gain, weight, bias, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        x, narrow, up, down, gain, weight, bias, y = ctx.saved_tensors
        rows, outputs = gradients[0].flatten(0, -2).contiguous(), y.flatten(0, -2)
        if ctx.kernels:
            from lycotool.training.kernels.columns import scaled_backward

            scaled, sums = scaled_backward(rows, outputs, gain, bias)
        else:
            scaled = torch.addcmul(rows, rows, gain)
            sums = (rows * (outputs if bias is None else outputs - bias)).sum(0)
        total = 1 + gain.to(sums.dtype)
        d_gain = sums / torch.where(total == 0, 1, total)
        back = scaled @ up
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = (scaled @ weight.to(scaled.dtype)).addmm_(back, down).view(x.shape)
        return dx, scaled.T @ narrow, back.T @ x.flatten(0, -2), d_gain.to(gain.dtype), None, None, None, None
