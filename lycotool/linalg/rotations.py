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


def rotate_stage(turns: Tensor, rows: Tensor, stage: int) -> Tensor:
    """Multiply rows, in the order of a stage of a butterfly, by its blocks ``(n, b, b)``."""
    block = turns.shape[-1]
    return from_butterfly(rotate_blocks(turns, to_butterfly(rows, block, stage)), block, stage)


def butterfly_blocks(turns: Tensor, first: int) -> Tensor:
    """``R_l … R_k - I`` of successive stages, which is block-diagonal in the order of :func:`rotate_runs`.

    In runs of half a block, stage ``i`` mixes those whose numbers differ in bit ``i``. So stages ``k``
    to ``l`` mix those that differ in these bits alone, as the first stages do on fewer rows. Blocks
    double from stage to stage, and the work is twice that of the last one.

    Parameters
    ----------
    turns
        ``R_i - I`` of the stages, ``(stages, n, b, b)``.
    first
        The number k of the first of them.

    Returns
    -------
    Tensor
        ``(n·b / (2^first · B), 2^first, B, B)`` with ``B = 2^(stages - 1) · b``.
    """
    stages, _, b, _ = turns.shape
    alone = torch.unflatten(turns, 1, (-1, 2 ** (stages - 1), 2**first)).movedim(3, 2)
    among, apart = alone.shape[1:3]
    alone = alone.flatten(1, 3)
    found = alone.new_zeros(2 * alone.shape[1], b // 2, b // 2)
    for stage in range(stages):
        size = 2**stage * b
        pairs = torch.diag_embed(
            torch.unflatten(found, 0, (-1, 2)).movedim(1, -1)
        )  # (.., row, column, half, half)
        change = pairs.permute(0, 3, 1, 4, 2).reshape(-1, size)
        identity = torch.eye(size, dtype=change.dtype, device=change.device)
        turned = change + identity.repeat(change.shape[0] // size, 1)
        found = (change + rotate_stage(alone[stage], turned, stage)).reshape(-1, size, size)
    return torch.unflatten(found, 0, (among, apart))


def rotate_runs(blocks: Tensor, rows: Tensor, run: int) -> Tensor:
    """Multiply rows by blocks, each of them made of runs that lie equally far apart.

    Parameters
    ----------
    blocks
        ``(m, apart, B, B)``: of ``apart`` blocks that lie in one another, the runs follow in turn.
    rows
        ``(m·apart·B, columns)``.
    run
        Rows that stay together.
    """
    among, apart, size, _ = blocks.shape
    if apart == 1:
        return rotate_blocks(blocks.flatten(0, 1), rows)
    runs = size // run
    ordered = torch.unflatten(rows, 0, (among, runs, apart, run)).transpose(1, 2).flatten(0, 3)
    turned = rotate_blocks(blocks.flatten(0, 1), ordered)
    return torch.unflatten(turned, 0, (among, apart, runs, run)).transpose(1, 2).flatten(0, 3)
