"""Numbers that describe a matrix by its singular values, and two matrices by their factors.

Nothing here forms a matrix that is given by factors, unless it is smaller than they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.dense import gram
from lycotool.linalg.eigen import eigenvalues
from lycotool.linalg.low_rank import LowRank, low_rank_split
from lycotool.linalg.ranks import fro
from lycotool.linalg.spectra import FactorSpectrum, Grams, grams, root_of, roots_above_noise, spectra

if TYPE_CHECKING:
    from torch import Tensor


def stable_rank(values: Tensor) -> float:
    """``‖A‖_F² / ‖A‖₂²``, at most the rank and hardly moved by small singular values; 0 for zero.

    Rudelson and Vershynin, J. ACM 54 (2007), where it is called numerical rank.
    """
    if not len(values) or values[0] == 0:
        return 0.0
    return float((values / values[0]).square().sum())


def effective_rank(values: Tensor) -> float:
    """``exp(-Σ p ln p)`` with ``p = σ / Σσ``: how many equal singular values are as spread; 0 for zero.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    if not len(values) or values[0] == 0:
        return 0.0
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def energy_rank(values: Tensor, share: float) -> int:
    """Fewest singular values whose squares sum to ``share`` of all; 0 for zero."""
    if not len(values) or values[0] == 0:
        return 0
    return fro(values, math.sqrt(share))


def singular_values(matrices: Sequence[LowRank | Tensor]) -> list[Tensor]:
    """Singular values of many matrices, equal sizes in one batch.

    From the ``r×r`` Grams of the factors, ``σ² = λ(Fᵀ H F)`` with ``F Fᵀ = upᵀ up`` and
    ``H = down downᵀ``; from the smaller Gram of the matrix itself where it is given dense, or its
    factors are larger than it.

    Returns
    -------
    list of Tensor
        As many as the rank of the factors allows; float64, descending, on the CPU; down to about
        1e-8 of the largest.
    """
    found: dict[int, Tensor] = {}
    factored: dict[int, list[tuple[int, Grams]]] = {}
    dense: dict[int, list[tuple[int, Tensor, int]]] = {}
    for index, matrix in enumerate(matrices):
        plain = matrix.folded() if isinstance(matrix, LowRank) else matrix
        rows, columns = plain.shape
        if isinstance(plain, LowRank) and plain.rank * (rows + columns) < rows * columns:
            factored.setdefault(plain.rank, []).append((index, grams(plain)))
        elif 0 in plain.shape:
            found[index] = torch.zeros(0, dtype=torch.float64)
        else:
            small = gram(plain.dense() if isinstance(plain, LowRank) else plain)
            bound = min(len(small), plain.rank) if isinstance(plain, LowRank) else len(small)
            dense.setdefault(len(small), []).append((index, small, bound))
    for pairs in factored.values():
        left, right = (torch.stack([getattr(part, side) for _, part in pairs]) for side in ("left", "right"))
        root = root_of(left)
        values = roots_above_noise(eigenvalues(root.mT @ right @ root)).cpu()
        found |= {index: row[: part.bound] for (index, part), row in zip(pairs, values, strict=True)}
    for group in dense.values():
        values = roots_above_noise(eigenvalues(torch.stack([small for _, small, _ in group]))).cpu()
        found |= {index: row[:bound] for (index, _, bound), row in zip(group, values, strict=True)}
    return [found[index] for index in range(len(matrices))]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike two matrices ``A`` and ``B`` of one shape are.

    Attributes
    ----------
    cosine
        ``⟨A, B⟩ / (‖A‖_F ‖B‖_F)``; None where one of them is zero.
    norms
        ``‖A‖_F`` and ``‖B‖_F``.
    inner
        ``⟨A, B⟩ = tr(Aᵀ B)``.
    overlap_out, overlap_in
        Of the column spaces and of the row spaces, see :func:`likeness`; None for zero.
    """

    cosine: float | None
    norms: tuple[float, float]
    inner: float
    overlap_out: float | None
    overlap_in: float | None


def likeness(first: LowRank, second: LowRank, *, energy: float = 0.9) -> Likeness:
    """Compare ``A = U₁ V₁`` with ``B = U₂ V₂`` by products of the factors' ranks alone.

    ``⟨A, B⟩ = tr(V₁ᵀ U₁ᵀ U₂ V₂) = Σ (U₁ᵀ U₂) ∘ (V₁ V₂ᵀ)``.

    The overlap of two subspaces with orthonormal bases ``P (n, i)`` and ``Q (n, j)`` is
    ``‖Pᵀ Q‖_F² / min(i, j)``: the mean of ``cos² θ`` over the principal angles, 1 where one
    subspace holds the other and 0 where they are orthogonal. [Hu et al., LoRA, arXiv 2106.09685,
    eq. 4; principal angles: Björck and Golub, Math. Comp. 27 (1973)] Each subspace is that of the
    leading singular vectors, as many as hold ``energy`` of the matrix' ``Σσ²``.

    Parameters
    ----------
    first, second
        Of one shape; computed in float64.
    """
    first, second = (_double(low.folded()) for low in (first, second))
    ours, theirs = spectra([grams(first), grams(second)])
    across_up, across_down = first.up.T @ second.up, first.down @ second.down.T
    inner = float((across_up * across_down).sum())
    norms = tuple(float(torch.linalg.vector_norm(found.values)) for found in (ours, theirs))
    if not all(norms):
        return Likeness(None, (norms[0], norms[1]), inner, None, None)
    i, j = (energy_rank(found.values, energy) for found in (ours, theirs))
    left = _left(ours, i).T @ across_up @ _left(theirs, j)  # U Σ = up B, so up B Σ⁻¹ = U
    right = ours.mix_down[:, :i].T @ across_down @ theirs.mix_down[:, :j]
    overlaps = [min(1.0, float(block.square().sum()) / min(i, j)) for block in (left, right)]
    cosine = max(-1.0, min(1.0, inner / (norms[0] * norms[1])))
    return Likeness(cosine, (norms[0], norms[1]), inner, overlaps[0], overlaps[1])


def as_factors(matrix: LowRank | Tensor) -> LowRank:
    """Any matrix as a product whose inner rank is at most its smaller side."""
    if isinstance(matrix, LowRank):
        return matrix.folded().capped()
    return LowRank(*low_rank_split(matrix))


def _double(low: LowRank) -> LowRank:
    return LowRank(low.up.double(), low.down.double())


def _left(spectrum: FactorSpectrum, rank: int) -> Tensor:
    """``B Σ⁻¹`` of the leading values: ``up`` times it are left singular vectors."""
    return spectrum.mix_up[:, :rank] / spectrum.values[:rank].to(spectrum.mix_up.device)
