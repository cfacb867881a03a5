"""Exact low-rank forms of a weight change, and their sums.

Every matrix here is the change flattened to ``(out, in·kernel)``; the columns run over the
input channel first and the kernel last, as ``weight.reshape(out, -1)`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """``ΔW = up @ down``, or with a CP core ``ΔW[o, i, k] = Σ up[o, p] core[p, q, k] down[q, i]``.

    Attributes
    ----------
    up
        ``(out, rank)``; carries every scale.
    down
        ``(rank, in·kernel)``, or ``(rank_in, in)`` when there is a core.
    core
        None, or ``(rank, rank_in, *kernel)``.
    """

    up: Tensor
    down: Tensor
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of ``up``."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in·kernel)``."""
        kernel = 1 if self.core is None else self.core[0, 0].numel()
        return self.up.shape[0], self.down.shape[1] * kernel

    def scaled(self, factor: float) -> LowRank:
        """The change times ``factor``, folded into ``up`` (exact for any sign)."""
        return LowRank(self.up * factor, self.down, self.core)

    def folded(self) -> LowRank:
        """The same change without a core, of the same rank."""
        if self.core is None:
            return self
        core = self.core.reshape(*self.core.shape[:2], -1)  # (rank, rank_in, kernel)
        down = torch.einsum("pqk, qi -> pik", core, self.down)
        return LowRank(self.up, down.reshape(self.rank, -1))

    def padded(self, rank: int) -> LowRank:
        """The same change with zero columns and rows up to ``rank`` (no core)."""
        missing = rank - self.rank
        if missing <= 0:
            return self
        up = torch.cat([self.up, self.up.new_zeros(self.up.shape[0], missing)], dim=1)
        return LowRank(up, torch.cat([self.down, self.down.new_zeros(missing, self.down.shape[1])]))

    def norm(self) -> Tensor:
        """The Frobenius norm, from the Grams of the factors: ``‖up @ down‖² = Σ upᵀup ∘ down downᵀ``."""
        plain = self.folded()
        square = ((plain.up.T @ plain.up) * (plain.down @ plain.down.T)).sum()
        return square.clamp_min(0).sqrt()

    def dense(self, memory: Tensor | None = None) -> Tensor:
        """``(out, in·kernel)``.

        Parameters
        ----------
        memory
            A contiguous tensor of that many elements to put it in; None is a new one.
        """
        plain = self.folded()
        if memory is None:
            return plain.up @ plain.down
        return torch.mm(plain.up, plain.down, out=memory.view(self.shape))

    def capped(self) -> LowRank:
        """The same change with a rank of at most ``min(out, in·kernel)``.

        Above that rank ``ΔW = I @ ΔW`` or ``ΔW @ I`` is exact and smaller.
        """
        rows, columns = self.shape
        if self.rank <= min(rows, columns):
            return self
        dense = self.dense()
        if rows <= columns:
            return LowRank(torch.eye(rows, dtype=dense.dtype, device=dense.device), dense)
        return LowRank(dense, torch.eye(columns, dtype=dense.dtype, device=dense.device))


def concat(parts: Sequence[LowRank]) -> LowRank:
    """The exact sum, of rank Σ rank: ``[up₁ up₂ …] @ [down₁; down₂; …]``.

    When every part has a core, so has the sum, block-diagonal in the two rank axes;
    otherwise the cores are folded into ``down`` first.
    """
    if any(part.core is None for part in parts):
        parts = [part.folded() for part in parts]
    up = torch.cat([part.up for part in parts], dim=1)
    down = torch.cat([part.down for part in parts], dim=0)
    cores = [part.core for part in parts if part.core is not None]
    return LowRank(up, down, _block_diagonal(cores) if cores else None)


def _block_diagonal(cores: Sequence[Tensor]) -> Tensor:
    rows = sum(core.shape[0] for core in cores)
    columns = sum(core.shape[1] for core in cores)
    total = cores[0].new_zeros((rows, columns, *cores[0].shape[2:]))
    row = column = 0
    for core in cores:
        total[row : row + core.shape[0], column : column + core.shape[1]] = core
        row, column = row + core.shape[0], column + core.shape[1]
    return total


def kron(left: Tensor, right: Tensor, memory: Tensor | None = None) -> Tensor:
    """The Kronecker product of two matrices.

    `torch.kron` fails on transposed inputs with an axis of length 1, contiguous or not.

    Parameters
    ----------
    memory
        A contiguous tensor of that many elements to put it in; None is a new one.
    """
    shape = left.shape[0], right.shape[0], left.shape[1], right.shape[1]
    out = None if memory is None else memory.view(shape)
    blocks = torch.mul(left[:, None, :, None], right[None, :, None, :], out=out)
    return blocks.reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])


def khatri_rao_rows(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise Khatri-Rao product: row ``i`` is ``left[i] ⊗ right[i]``.

    ``(A B) ∘ (C D) = khatri_rao_rows(A, C) @ khatri_rao_rows(Bᵀ, Dᵀ)ᵀ``, which makes a
    Hadamard product of two low-rank matrices low-rank (FedPara, arXiv 2108.06098, prop. 1).

    Parameters
    ----------
    left, right
        ``(n, p)`` and ``(n, q)``.

    Returns
    -------
    Tensor
        ``(n, p·q)``.
    """
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def low_rank_split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix = left @ right`` with an identity on the smaller side: exact, no rounding."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype, device=matrix.device), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
