"""``y = (1 + gain) ∘ z + b`` over the columns, and both its gradients, in one pass each over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 64


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of this program and which there are, and the places of its elements and which there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    inside = (row < rows)[:, None] & known[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    return column, known, place, inside


@triton.jit
def _scale(
    z,
    gain,
    bias,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column, known, place, inside = _tile(rows, columns, ROWS, COLUMNS)
    factor = 1.0 + tl.load(gain + column, mask=known, other=0.0).to(tl.float32)
    value = tl.load(z + place, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    if HAS_BIAS:
        value += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(z + place, value.to(z.dtype.element_ty), mask=inside)


def scale(z: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """Write ``(1 + gain) ∘ z + b`` over z.

    Parameters
    ----------
    z
        ``(rows, columns)``, contiguous.
    gain, bias
        ``(columns,)``.
    """
    rows, columns = z.shape
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    _scale[grid](
        z, gain, gain if bias is None else bias, rows, columns, HAS_BIAS=bias is not None, ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )  # fmt: skip


@triton.jit
def _backward(
    dy,
    y,
    gain,
    bias,
    dz,
    sums,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column, known, place, inside = _tile(rows, columns, ROWS, COLUMNS)
    gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        output -= tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    scale = 1.0 + tl.load(gain + column, mask=known, other=0.0).to(tl.float32)
    tl.store(dz + place, (gradient * scale[None, :]).to(dz.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * columns + column, tl.sum(gradient * output, 0), mask=known)


@triton.jit
def _finish(sums, gain, d_gain, blocks, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``Σ sums / (1 + gain)``; what is of no gain at all has no gradient."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, blocks, ROWS):
        block = start + tl.arange(0, ROWS)
        inside = (block < blocks)[:, None] & known[None, :]
        total += tl.sum(tl.load(sums + block[:, None] * columns + column[None, :], mask=inside, other=0.0), 0)
    factor = 1.0 + tl.load(gain + column, mask=known, other=0.0).to(tl.float32)
    factor = tl.where(factor == 0.0, 1.0, factor)
    tl.store(d_gain + column, (total / factor).to(d_gain.dtype.element_ty), mask=known)


def scaled_backward(dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of z and the gain: ``dy ∘ (1 + gain)`` and ``Σ dy ∘ (y - b) / (1 + gain)`` over the rows.

    Products and sums are in float32.

    Parameters
    ----------
    dy, y
        ``(rows, columns)``, contiguous.
    gain, bias
        ``(columns,)``.
    """
    rows, columns = y.shape
    dz, d_gain = torch.empty_like(y), torch.empty_like(gain)
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    sums = torch.empty(grid[0], columns, dtype=torch.float32, device=y.device)
    _backward[grid](
        dy, y, gain, gain if bias is None else bias, dz, sums, rows, columns, HAS_BIAS=bias is not None,
        ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    _finish[(grid[1],)](sums, gain, d_gain, grid[0], columns, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return dz, d_gain
