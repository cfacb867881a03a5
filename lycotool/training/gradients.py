"""The gradients of a layer's product, for functions that write their own backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer


def gradients_of_product(
    layer: TrainableLayer,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    for_input: bool = True,
    for_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and W in ``y = op(x, W)`` from that of y; None for what is not wanted.

    Parameters
    ----------
    layer
        Linear, or a convolution whose padding is numbers.
    weight
        In x's dtype, as the gradients are.
    """
    if not (for_input or for_weight):
        return None, None
    if layer.kind == "linear":
        dx = gradient @ weight if for_input else None
        return dx, gradient.flatten(0, -2).T @ x.flatten(0, -2) if for_weight else None
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, layer.stride, layer.padding, layer.dilation, False,
        [0] * len(layer.kernel), layer.groups, [for_input, for_weight, False],
    )  # fmt: skip
    return found[0], found[1]
