"""Orthogonal matrices from skew ones, and the butterfly order BOFT applies them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def cayley_minus_identity(blocks: Tensor, bound: float) -> Tensor:
    """``R - I`` of the rotations ``R = (I + Q)(I - Q)⁻¹`` with ``Q = B - Bᵀ``.

    ``R - I = 2 Q (I - Q)⁻¹`` keeps the digits of a small rotation, which ``R`` itself loses.
    Solved in float64: the blocks are small. Nothing waits for a value, so that a training step
    can be captured, and the gradient at ``Q = 0`` is finite.

    Parameters
    ----------
    blocks
        ``B``, ``(..., b, b)``.
    bound
        If positive, ``Q`` is shrunk to this Frobenius norm, taken over all blocks together.
    """
    b = blocks.double()
    q = b - b.transpose(-1, -2)
    if bound > 0:
        q = q / (torch.linalg.vector_norm(q) / bound).clamp_min(1.0)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # X (I - Q) = 2 Q, solved for X from the left after transposing.
    # I - Q is never singular: its symmetric part is I.
    solution: Tensor = torch.linalg.solve_ex((identity - q).transpose(-1, -2), 2 * q.transpose(-1, -2))[0]
    return solution.transpose(-1, -2).to(blocks.dtype)


def rotate_blocks(blocks: Tensor, rows: Tensor) -> Tensor:
    """Multiply each run of ``b`` rows by its block.

    Parameters
    ----------
    blocks
        ``(n, b, b)``.
    rows
        ``(n·b, columns)``; the product is in this dtype.
    """
    n, b, _ = blocks.shape
    return torch.bmm(blocks.to(rows.dtype), rows.reshape(n, b, -1)).reshape(rows.shape)


def to_butterfly(rows: Tensor, block: int, stage: int) -> Tensor:
    """Rows ``(n, columns)`` in the order in which stage ``stage`` rotates blocks of ``block``.

    Rows ``(c, g, k)`` become ``(c, k, g)`` with ``g = 2`` and ``k = 2^stage · block / 2``
    (BOFT, arXiv 2311.06243; order as LyCORIS applies it).
    """
    return torch.unflatten(rows, 0, (-1, 2, 2**stage * (block // 2))).transpose(1, 2).flatten(0, 2)


def from_butterfly(rows: Tensor, block: int, stage: int) -> Tensor:
    """The inverse of :func:`to_butterfly`."""
    return torch.unflatten(rows, 0, (-1, 2**stage * (block // 2), 2)).transpose(1, 2).flatten(0, 2)
