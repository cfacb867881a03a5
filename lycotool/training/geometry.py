"""What a layer of a model does with its weight."""

from __future__ import annotations

from torch import nn

from lycotool.algorithms.layer import TrainableLayer
from lycotool.errors import IncompatibleError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def describe_layer(module: nn.Module) -> TrainableLayer | None:
    """A module's geometry; None for one that no algorithm trains.

    Raises
    ------
    IncompatibleError
        For a convolution that pads with something other than zeros.
    """
    if isinstance(module, nn.Linear):
        return TrainableLayer("linear", tuple(module.weight.shape), module.bias is not None)
    if isinstance(module, _CONVOLUTIONS):
        if module.padding_mode != "zeros":
            raise IncompatibleError(f"a convolution pads with {module.padding_mode}, expected zeros")
        return TrainableLayer(
            "conv",
            tuple(module.weight.shape),
            module.bias is not None,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
        )
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        if module.weight is None:
            return None
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 0
        shape = tuple(module.weight.shape)
        return TrainableLayer("norm", shape, module.bias is not None, groups=groups, eps=module.eps)
    return None
