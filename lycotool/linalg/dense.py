"""Singular values and best approximations of dense matrices, one or many at a time.

Everything goes by the smaller Gram matrix in float64, ``A Aᵀ = U Σ² Uᵀ``: its whole spectrum
(:func:`exact`), or only the leading part of it (:func:`leading`). Squaring in float64 leaves
values down to about 1e-8 of the largest, below the rounding of float32 weights. Never a full
SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.eigen import eigh
from lycotool.linalg.low_rank import LowRank
from lycotool.linalg.subspace import OVERSAMPLING, leading_eigenvectors

if TYPE_CHECKING:
    from torch import Tensor

#: Matrices whose smaller side is at most this long are always decomposed exactly: their
#: eigenvalues cost no more than a few projections.
_SMALL = 192

#: Elements converted to float64 at a time: 128 MiB, whatever the size of the matrices.
_GRAM_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class DenseSpectrum:
    """The exact spectrum of a matrix: ``σ²`` and ``U`` are eigenpairs of ``A Aᵀ``.

    Attributes
    ----------
    values
        Singular values, float64, descending, on the CPU.
    basis
        Singular vectors of the shorter side, in float64.
    """

    values: Tensor
    basis: Tensor

    def truncated(self, rank: int, matrix: Tensor) -> LowRank:
        """``up = U_k Σ_k``, ``down = V_kᵀ``, from the matrix the spectrum is of."""
        return LowRank(*_factors(matrix, self.values[:rank].to(matrix.device), self.basis[:, :rank]))


def exact(matrix: Tensor) -> DenseSpectrum:
    """The whole spectrum of one matrix."""
    squares, basis = eigh(gram(matrix)[None])
    return DenseSpectrum(squares[0].clamp_min(0).sqrt().cpu(), basis[0])


@dataclass(frozen=True, slots=True)
class Leading:
    """The best approximations of a batch: ``up = U_k Σ_k``, ``down = V_kᵀ``.

    ``up`` ``(batch, m, k)`` and ``down`` ``(batch, k, n)`` are in the matrices' dtype and on
    their device; ``values`` ``(batch, k)``, the largest singular values, are in float64 there.
    """

    up: Tensor
    down: Tensor
    values: Tensor


def leading(matrices: Tensor, rank: int, *, seed: int) -> Leading:
    """The best approximations of a rank, each within 1.001 of the optimal error.

    Parameters
    ----------
    matrices
        ``(batch, m, n)``.
    rank
        At most ``min(m, n)`` of it is used.
    seed
        For the random start; equal seeds give equal results on one device.
    """
    shorter = min(matrices.shape[1:])
    rank = min(rank, shorter)
    grams = torch.stack([gram(matrix) for matrix in matrices])
    if shorter <= _SMALL or 3 * (rank + OVERSAMPLING) > shorter:
        squares, basis = eigh(grams)
    else:
        squares, basis, converged = leading_eigenvectors(grams, rank, seed=seed)
        for index in torch.nonzero(~converged).flatten().tolist():
            whole, vectors = eigh(grams[index : index + 1])
            squares[index], basis[index] = whole[0, :rank], vectors[0, :, :rank]
    values = squares[:, :rank].clamp_min(0).sqrt()
    return Leading(*_factors(matrices, values, basis[..., :rank]), values)


def best_approximation(matrix: Tensor, rank: int, *, seed: int) -> LowRank:
    """:func:`leading` of one matrix."""
    found = leading(matrix[None], rank, seed=seed)
    return LowRank(found.up[0], found.down[0])


def gram(matrix: Tensor) -> Tensor:
    """``A Aᵀ`` or ``Aᵀ A``, whichever is smaller, in float64."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    shorter = len(wide)
    total = torch.zeros(shorter, shorter, dtype=torch.float64, device=wide.device)
    step = max(1, _GRAM_CHUNK // shorter)
    for start in range(0, wide.shape[1], step):
        rows = wide[:, start : start + step].double()
        total.addmm_(rows, rows.T)
    return total


def _factors(matrix: Tensor, values: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``U Σ`` and ``Vᵀ`` of matrices, from their values and the shorter side's vectors."""
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)  # a repeatable sign
    if matrix.shape[-2] > matrix.shape[-1]:
        return matrix @ basis.to(matrix.dtype), basis.mT.to(matrix.dtype)  # U Σ = A V
    values = values.unsqueeze(-2)
    # A direction without length keeps its basis vector and gets a zero scale.
    inverse = torch.where(values > values[..., :1] * 1e-12, 1 / values.clamp_min(1e-300), 0)
    down = (basis * inverse).to(matrix.dtype).mT @ matrix
    return (basis * values).to(matrix.dtype), down


def nearest_kronecker(matrix: Tensor, first: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The ``w1 ⊗ w2`` nearest to a matrix in Frobenius norm.

    Rearranged so that each block of the matrix is a row, a Kronecker product has rank 1;
    the nearest one comes from the leading singular pair (Van Loan and Pitsianis, 1993).

    Parameters
    ----------
    matrix
        ``(a·b, c·d)``; a convolution flattened has its kernel inside ``d``.
    first
        ``(a, c)``, the shape of ``w1``.

    Returns
    -------
    Tensor, Tensor
        ``w1 (a, c)`` and ``w2 (b, d)``, with equal norms.
    """
    a, c = first
    b, d = matrix.shape[0] // a, matrix.shape[1] // c
    blocks = matrix.reshape(a, b, c, d).permute(0, 2, 1, 3).reshape(a * c, b * d)
    spectrum = exact(blocks)
    low = spectrum.truncated(1, blocks)
    scale = spectrum.values[0].sqrt().to(matrix.device, matrix.dtype)
    if scale == 0:
        return torch.zeros_like(low.up.reshape(a, c)), low.down.reshape(b, d)
    return (low.up / scale).reshape(a, c), (low.down * scale).reshape(b, d)


#: Rounds of :func:`tucker` at most; each gains less than the one before.
_TUCKER_ROUNDS = 20


def tucker(tensor: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A CP-form convolution (Tucker in the two channel axes) near a tensor.

    Starts from the leading directions of the two unfoldings (HOSVD) and improves each side for
    the other in turn until that gains nothing (HOOI; De Lathauwer, De Moor and Vandewalle, SIAM
    J. Matrix Anal. Appl. 21, 2000). The core is the exact projection,
    ``core = upᵀ ×₁ T ×₂ down``. A local optimum: nobody knows how to find the best.

    Parameters
    ----------
    tensor
        ``(out, in, *kernel)``.
    rank
        At most ``min(out, in)`` of it is used.

    Returns
    -------
    Tensor, Tensor, Tensor
        ``up (out, r)`` and ``down (r, in)``, orthonormal, and between them ``core (r, r, *kernel)``.
    """
    rank = min(rank, tensor.shape[0], tensor.shape[1])
    left = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    down = _left_vectors(tensor.transpose(0, 1).flatten(1), rank, seed)
    kept = 0.0
    for _ in range(_TUCKER_ROUNDS):
        narrow = torch.einsum("oi..., iq -> oq...", tensor, down)
        up = _left_vectors(narrow.flatten(1), rank, seed)
        short = torch.einsum("oi..., op -> ip...", tensor, up)
        down = _left_vectors(short.flatten(1), rank, seed)
        core = torch.einsum("ip..., iq -> pq...", short, down)
        energy = float(torch.linalg.vector_norm(core, dtype=torch.float64)) ** 2
        if energy - kept <= 1e-4 * max(left - energy, 1e-7 * left):
            break
        kept = energy
    return up, core, down.T


def _left_vectors(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal leading left singular vectors."""
    basis: Tensor = torch.linalg.qr(best_approximation(matrix, rank, seed=seed).up).Q
    return basis
