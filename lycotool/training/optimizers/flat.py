"""Parameters and gradients of a group in one buffer each.

An optimizer that works element by element does the same on one long vector as on its parts;
there it needs one kernel, clipping another one, and averaging over devices one transfer. The
modules keep their parameters, which become views; the gradients autograd adds to are views too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch.nn import Parameter

#: Elements each parameter's place is a multiple of: 64 bytes of float32, for aligned loads.
_ALIGNMENT = 16


def padded(count: int) -> int:
    """Elements that a parameter of so many takes in a buffer."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def flatten(parameters: Sequence[Parameter]) -> Parameter:
    """One vector whose pieces become the data of ``parameters``, with a gradient of zeros.

    Parameters
    ----------
    parameters
        At least one; of one dtype on one device. Each keeps its values.
    """
    places = [padded(parameter.numel()) for parameter in parameters]
    first = parameters[0]
    whole = torch.nn.Parameter(torch.zeros(sum(places), dtype=first.dtype, device=first.device))
    whole.grad = torch.zeros_like(whole)
    start = 0
    for parameter, place in zip(parameters, places, strict=True):
        stop = start + parameter.numel()
        data = whole.data[start:stop].view(parameter.shape)
        data.copy_(parameter.data)
        parameter.data = data
        parameter.grad = whole.grad[start:stop].view(parameter.shape)
        start += place
    return whole
