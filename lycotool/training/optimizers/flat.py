"""Parameters and gradients of a group in one buffer each.

An optimizer that works element by element does the same on one long vector as on its parts;
there it needs one kernel, clipping another one, and averaging over devices one transfer. The
modules keep their parameters, which become views; the gradients autograd adds to are views too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

#: Elements each parameter's place is a multiple of: 64 bytes of float32, for aligned loads.
_ALIGNMENT = 16


def padded(count: int) -> int:
    """Elements that a parameter of so many takes in a buffer."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def room(parameters: Sequence[Parameter]) -> int:
    """Elements that ``parameters`` take in a buffer."""
    return sum(padded(parameter.numel()) for parameter in parameters)


def flatten(parameters: Sequence[Parameter], gradient: Tensor) -> Parameter:
    """One vector whose pieces become the data of ``parameters``, with their gradients in another.

    Parameters
    ----------
    parameters
        At least one; of one dtype on one device. Each keeps its values.
    gradient
        ``(room(parameters),)`` zeros.
    """
    first = parameters[0]
    whole = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=first.dtype, device=first.device))
    whole.grad = gradient
    for parameter, data in _pieces(parameters, whole.data):
        data.copy_(parameter.data)
        parameter.data = data
    collect(parameters, gradient)
    return whole


def collect(parameters: Sequence[Parameter], gradient: Tensor) -> None:
    """Make pieces of ``gradient`` the gradients of ``parameters``, which stay where they are."""
    for parameter, piece in _pieces(parameters, gradient):
        parameter.grad = piece


def _pieces(parameters: Sequence[Parameter], buffer: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
    start = 0
    for parameter in parameters:
        yield parameter, buffer[start : start + parameter.numel()].view(parameter.shape)
        start += padded(parameter.numel())
