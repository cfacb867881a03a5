"""DoRA's gain of each row of W' as a gain of each channel of the output, which is written over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer


def scaled(
    z: Tensor, gain: Tensor, bias: Tensor | None, layer: TrainableLayer, *, kernels: bool = False
) -> Tensor:
    """``(1 + gain) ∘ z + b`` over the channels of an output, in z's place.

    Differentiable in z and the gain. Left to itself, autograd keeps z beside the result, which
    later layers keep too; here the gain's gradient is made of the result.

    Parameters
    ----------
    z
        Of a function that needs it no more.
    gain, bias
        Cast to z's dtype.
    kernels
        Whether Triton's are used.
    """
    given = None if bias is None else bias.to(z.dtype)
    return cast("Tensor", cast("Any", _Scaled).apply(z, gain.to(z.dtype), given, layer, kernels))


class _Scaled(torch.autograd.Function):
    """The bias has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        z: Tensor,
        gain: Tensor,
        bias: Tensor | None,
        layer: TrainableLayer,
        kernels: bool,
    ) -> Tensor:
        ctx.mark_dirty(z)
        ctx.layer, ctx.axis = layer, layer.channel_axis
        ctx.kernels = kernels and z.movedim(ctx.axis, -1).is_contiguous()
        if ctx.kernels:
            from lycotool.training.kernels.columns import scale

            scale(_rows(z, ctx.axis), gain, bias)
        else:
            z.addcmul_(z, layer.channels(gain, z))
            if bias is not None:
                z.add_(layer.channels(bias, z))
        ctx.save_for_backward(z, gain, bias)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (dy,) = gradients
        y, gain, bias = ctx.saved_tensors
        layer: TrainableLayer = ctx.layer
        if ctx.kernels:
            from lycotool.training.kernels.columns import scaled_backward

            rows = dy.movedim(ctx.axis, -1).contiguous()
            dz, d_gain = scaled_backward(rows.view(-1, len(gain)), _rows(y, ctx.axis), gain, bias)
            return dz.view(rows.shape).movedim(-1, ctx.axis), d_gain, None, None, None
        z = y if bias is None else y - layer.channels(bias, y)
        sums = layer.rows(dy * z).sum(1)
        total = 1 + gain
        d_gain = sums / torch.where(total == 0, 1, total)
        return torch.addcmul(dy, dy, layer.channels(gain, dy)), d_gain, None, None, None


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """Every position a row of channels: a view."""
    return tensor.movedim(axis, -1).view(-1, tensor.shape[axis])
