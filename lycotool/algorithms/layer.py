"""A layer that is trained: its geometry, and what weights of that geometry do to an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms.base import Shape
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.linalg.low_rank import LowRank

Kind = Literal["linear", "conv", "norm"]


@dataclass(frozen=True, slots=True)
class TrainableLayer:
    """What a layer does with a weight, as data.

    Every method works in the dtype of the input and casts weights to it once.

    Attributes
    ----------
    kind
        ``norm`` is a layer norm, or with ``groups`` above 0 a group norm.
    shape
        The weight's shape: ``(out, in)``, ``(out, in / groups, *kernel)`` or ``(channels,)``.
    bias
        Whether the layer has one.
    stride, padding, dilation
        Those of a convolution; empty for others.
    groups
        Of a convolution's channels, or of a group norm's; 0 for a layer norm.
    eps
        Of a norm.
    """

    kind: Kind
    shape: Shape
    bias: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    eps: float = 1e-5

    @property
    def out(self) -> int:
        """Rows of the weight, channels of the output."""
        return self.shape[0]

    @property
    def kernel(self) -> Shape:
        """``()`` for linear layers and norms."""
        return self.shape[2:]

    @property
    def numel(self) -> int:
        """Elements of the weight: multiply-adds for each position of the output."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def channel_axis(self) -> int:
        """The axis of an output (or input) that its channels lie on."""
        return 1 if self.kind == "conv" or (self.kind == "norm" and self.groups) else -1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``op(x, weight, bias)``: what the layer would give with these.

        Parameters
        ----------
        weight
            Any shape of the weight's elements; a convolution may have other channels but not
            another kernel.
        """
        functional = torch.nn.functional
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if self.kind == "linear":
            return functional.linear(x, weight, bias)
        if self.kind == "conv":
            return _convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if self.groups:
            return functional.group_norm(x, self.groups, weight, bias, self.eps)
        return functional.layer_norm(x, self.shape, weight, bias, self.eps)

    def pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``matrix @ x`` over the channels, at every position by itself."""
        if self.kind == "linear":
            return torch.nn.functional.linear(x, matrix.to(x.dtype))
        spread = matrix.to(x.dtype).reshape(*matrix.shape, *[1] * (x.ndim - 2))
        return _convolve(x, spread, None, 1, 0, 1, 1)

    def low_rank(self, x: Tensor, low: LowRank) -> Tensor:
        """``op(x, low.dense())`` without the dense matrix (of one group)."""
        if low.core is None:
            narrow = self.apply(x, low.down.reshape(low.rank, -1, *self.kernel))
        else:
            narrow = self.apply(self.pointwise(x, low.down), low.core)
        return self.pointwise(narrow, low.up)

    def channels(self, vector: Tensor, like: Tensor) -> Tensor:
        """A value for each channel, shaped to broadcast over ``like`` and in its dtype."""
        shape = [1] * like.ndim
        shape[self.channel_axis] = -1
        return vector.to(like.dtype).reshape(shape)

    def rows(self, output: Tensor) -> Tensor:
        """An output as a matrix ``(channels, positions)``, like a weight's rows."""
        return output.movedim(self.channel_axis, 0).flatten(1)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, for an output shaped like ``like``."""
        moved = like.movedim(self.channel_axis, 0).shape
        return rows.reshape(rows.shape[0], *moved[1:]).movedim(0, self.channel_axis)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    dilation: int | tuple[int, ...],
    groups: int,
) -> Tensor:
    functional = torch.nn.functional
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[weight.ndim]
    result: Tensor = convolve(x, weight, bias, stride, padding, dilation, groups)
    return result
