"""Weights as float8 times scales of blocks: ``W = stored · scale``, and back.

A weight counts as a matrix of its first axis by all others. A grid of scales lies over it,
each for one block; the blocks of the last row and column may be smaller.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.finite import extremes

if TYPE_CHECKING:
    from torch import Tensor

Block = tuple[int, int]

#: Elements that are looked up at once: their places take four bytes each, in memory that is used again.
_PIECE = 2**18


@dataclass(slots=True)
class Rounding:
    """What was lost by storing weights as float8: errors, and values beyond the range."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    saturated: int = 0

    @property
    def mean(self) -> float:
        """The mean absolute error."""
        return self.total / self.count if self.count else 0.0

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Count a tensor's errors; ``stored`` is overwritten.

        Parameters
        ----------
        exact, stored
            What was meant and what is read back, in the same floating dtype.
        """
        if exact.numel() == 0:
            return
        error = stored.sub_(exact).abs_()
        self.largest = max(self.largest, float(error.max()))
        self.total += float(error.sum(dtype=torch.float64))
        self.count += error.numel()


def read_into(values: Tensor, stored: Tensor) -> Tensor:
    """``values`` becomes what is stored, exactly, as `copy_` would have it.

    float8 is looked up in a table of its 256 values on a CPU, where torch takes four times as long
    to convert it.

    Parameters
    ----------
    values
        Of the stored shape and a dtype that has all its values.
    """
    float8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    is_plain = (
        stored.device.type == values.device.type == "cpu"
        and stored.is_contiguous()
        and values.is_contiguous()
    )
    if stored.dtype not in float8 or values.dtype != torch.float32 or not is_plain:
        return values.copy_(stored)
    table, codes, flat = _values_of(stored.dtype), stored.view(torch.uint8).view(-1), values.view(-1)
    memory = torch.empty(min(_PIECE, codes.numel()), dtype=torch.int32)
    for start in range(0, codes.numel(), _PIECE):
        piece = codes[start : start + _PIECE]
        places = memory[: len(piece)].copy_(piece)
        torch.index_select(table, 0, places, out=flat[start : start + len(piece)])
    return values


@functools.cache
def _values_of(dtype: torch.dtype) -> Tensor:
    """The value of each of the 256 codes, in float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def dequantise_(weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """Multiply the stored values by their scales, in place.

    Parameters
    ----------
    weight
        The stored values in a dtype to compute in.
    scale
        (rows, columns) of scales.
    block
        Rows and columns of the weight that share one.
    """
    scale = scale.to(weight)
    for part, factor in _parts(weight, scale, block):
        part.mul_(factor)
    return weight


def requantise_(
    weight: Tensor, grid: Block, block: Block, dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Store a weight as float8 with new scales: ``scale = max|W| / max(dtype)`` in each block.

    Parameters
    ----------
    weight
        Finite, in a dtype to compute in; it is overwritten.
    grid
        Rows and columns of scales.
    scale_dtype
        What the scales are stored as; the values are divided by what is stored.

    Returns
    -------
    Tensor
        The stored values.
    Tensor
        The scales, of the grid's shape. A block of zeros has scale 1.
    int
        How many values lie beyond the range and were stored as its end: none unless
        ``scale_dtype`` cannot hold the scale.
    """
    limit = torch.finfo(dtype).max
    peaks = _peaks(weight, grid, block)
    held = torch.finfo(scale_dtype)
    scale = torch.where(peaks > 0, peaks / limit, 1.0)
    scale = scale.clamp(held.smallest_normal * held.eps, held.max).to(scale_dtype)
    for part, factor in _parts(weight, scale.to(weight), block):
        part.div_(factor)
    beyond = count_beyond(weight, dtype)
    return weight.clamp_(-limit, limit).to(dtype), scale, beyond


def count_beyond(weight: Tensor, dtype: torch.dtype) -> int:
    """How many values a dtype cannot hold: larger than what rounds to its largest."""
    limit = torch.finfo(dtype).max
    spacing = 2.0 ** math.floor(math.log2(limit)) * torch.finfo(dtype).eps
    if weight.numel() == 0:
        return 0
    low, high = extremes(weight)
    if max(-low, high) <= limit + spacing / 2:
        return 0
    return int((weight.abs() > limit + spacing / 2).sum())


def _peaks(weight: Tensor, grid: Block, block: Block) -> Tensor:
    """The largest magnitude in every block."""
    peaks = weight.new_zeros(grid)
    if weight.numel() == 0:
        return peaks
    for part, peak in _parts(weight, peaks, block, whole=True):
        dims = (1, 3) if part.ndim == 4 else (0,)
        values = torch.maximum(part.amax(dims), -part.amin(dims))
        if part.ndim == 2:  # one row of blocks, the last of which may be narrower
            values = torch.nn.functional.pad(values, (0, grid[1] * block[1] - values.numel()))
            values = values.view(grid[1], block[1]).amax(1)
        peak.copy_(values)
    return peaks


def _parts(
    weight: Tensor, scale: Tensor, block: Block, *, whole: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the weight, each with the scales of its blocks.

    Where the blocks fill the weight it is one view, (block row, row, block column, column);
    else one of each row of blocks. The scales broadcast against it, unless they are to be
    given ``whole``.
    """
    if weight.numel() == 0:
        return
    matrix = weight.view(weight.shape[0] if weight.ndim else 1, -1)
    rows, columns = scale.shape
    if matrix.shape == (rows * block[0], columns * block[1]):
        view = matrix.view(rows, block[0], columns, block[1])
        yield view, scale if whole else scale[:, None, :, None]
        return
    for row in range(rows):
        part = matrix[row * block[0] : (row + 1) * block[0]]
        yield part, scale[row] if whole else scale[row].repeat_interleave(block[1])[: matrix.shape[1]]


def round_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Store every row of a weight in 8 bits: ``round(W / scale)`` with a scale for each row.

    For float8 the scale is the smallest power of 2 with which the row fits: float8 has as many
    digits anywhere in its range, so nothing is lost by that, and ``stored · scale`` is exact in
    bfloat16 and float32. For int8 it is ``max|W| / 127``, rounded to bfloat16.

    Parameters
    ----------
    weight
        Float32, rows along the first axis.
    dtype
        float8_e4m3fn or int8.

    Returns
    -------
    stored
        Of ``dtype``, in the weight's shape and layout.
    scale
        Float32, ``(rows, 1, …)``. A row of zeros has scale 1.
    """
    peaks = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scale = torch.where(peaks > 0, peaks / limit, 1.0)
    if dtype.is_floating_point:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
        return (weight / scale).clamp_(-limit, limit).to(dtype), scale
    scale = scale.bfloat16().float()
    return (weight / scale).round_().clamp_(-limit, limit).to(dtype), scale


def rebuild_rows(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``stored · scale`` in a dtype, rounded once: what :func:`round_rows` has stored."""
    return stored.to(dtype).mul_(scale.to(dtype))
