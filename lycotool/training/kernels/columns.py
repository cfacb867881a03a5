"""The two halves of the gradient of ``y = (1 + gain) ∘ z + b``, in one pass over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 64


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
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    inside = (row < rows)[:, None] & known[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        output -= tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    scale = 1.0 + tl.load(gain + column, mask=known, other=0.0).to(tl.float32)
    tl.store(dz + place, (gradient * scale[None, :]).to(dz.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * columns + column, tl.sum(gradient * output, 0), mask=known)


def scaled_backward(dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dy ∘ (1 + gain)`` and ``Σ dy ∘ (y - b)`` over the rows, the latter in float32.

    Parameters
    ----------
    dy, y
        ``(rows, columns)``, contiguous.
    gain, bias
        ``(columns,)``.
    """
    rows, columns = y.shape
    dz = torch.empty_like(y)
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    sums = torch.empty(grid[0], columns, dtype=torch.float32, device=y.device)
    _backward[grid](
        dy, y, gain, gain if bias is None else bias, dz, sums, rows, columns, HAS_BIAS=bias is not None,
        ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return dz, sums.sum(0)
