"""A layer's product with ``W + ΔW``, where the sum must not be rounded to the input's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lycotool.training.gradients import gradients_of_product

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer


def product_with_sum(
    layer: TrainableLayer, x: Tensor, weight: Tensor, change: Tensor, bias: Tensor | None
) -> Tensor:
    """``op(x, W + ΔW) + b``, as one product where W and ΔW have the input's dtype.

    In half precision ``W + ΔW`` would lose a small ΔW, so the forward pass has two products;
    the gradient of the input needs one, because there the sum is rounded as every operand is.
    """
    if x.dtype == weight.dtype == change.dtype:
        return layer.apply(x, weight + change, bias)
    if layer.kind == "norm" or isinstance(layer.padding, str):
        return layer.apply(x, weight, bias) + layer.apply(x, change)
    product: Tensor = cast("Any", _TwoProducts).apply(x, change, weight, bias, layer)
    return product


class _TwoProducts(torch.autograd.Function):
    """Two products forward, one for each gradient; W and the bias have none."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        change: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, change.dtype
        ctx.save_for_backward(x, (weight.to(change.dtype) + change).to(x.dtype))
        return layer.apply(x, weight, bias) + layer.apply(x, change)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (gradient,) = gradients
        x, total = ctx.saved_tensors
        dx, change = gradients_of_product(ctx.layer, gradient, x, total, for_input=ctx.needs_input_grad[0])
        return dx, None if change is None else change.to(ctx.dtype), None, None, None
