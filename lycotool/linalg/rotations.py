"""Orthogonal matrices from skew ones, and the butterfly order BOFT applies them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def cayley_minus_identity(blocks: Tensor, bound: float) -> Tensor:
    """``R - I`` of the rotations ``R = (I + Q)(I - Q)⁻¹`` with ``Q = B - Bᵀ``.

    ``R - I = 2 Q (I - Q)⁻¹`` keeps the digits of a small rotation, which ``R`` itself loses.
    Solved in float64: the blocks are small.

    Parameters
    ----------
    blocks
        ``B``, ``(..., b, b)``.
    bound
        If positive, ``Q`` is shrunk to this Frobenius norm, taken over all blocks together.
    """
    b = blocks.double()
    q = b - b.transpose(-1, -2)
    norm = torch.linalg.vector_norm(q)
    if bound > 0 and norm > bound:
        q = q * (bound / norm)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # X (I - Q) = 2 Q, solved for X from the left after transposing.
    solution: Tensor = torch.linalg.solve((identity - q).transpose(-1, -2), 2 * q.transpose(-1, -2))
    return solution.transpose(-1, -2).to(blocks.dtype)


def rotate_blocks(blocks: Tensor, rows: Tensor) -> Tensor:
    """Multiply each run of ``b`` rows by its block.

    Parameters
    ----------
    blocks
        ``(n, b, b)``.
    rows
        ``(n·b, columns)``.
    """
    n, b, _ = blocks.shape
    return torch.bmm(blocks, rows.reshape(n, b, -1)).reshape(rows.shape)


def butterfly_order(rows: int, block: int, stage: int) -> Tensor:
    """Which row stands where before stage ``stage`` of a butterfly with blocks of ``block``.

    Rows ``(c, g, k)`` become ``(c, k, g)`` with ``g = 2`` and ``k = 2^stage · block / 2``
    (BOFT, arXiv 2311.06243; order as LyCORIS applies it).
    """
    k = 2**stage * (block // 2)
    return torch.arange(rows).reshape(-1, 2, k).transpose(1, 2).reshape(-1)
