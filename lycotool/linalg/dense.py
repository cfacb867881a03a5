"""Singular values and best approximations of dense matrices, one or a batch of equal shape.

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
        values = self.values[:rank].to(matrix.device)
        up, down = _factors(matrix[None], values[None], self.basis[None, :, :rank])
        return LowRank(up[0], down[0])


def exact(matrix: Tensor) -> DenseSpectrum:
    """The whole spectrum of one matrix."""
    squares, basis = eigh(_grams(matrix[None]))
    return DenseSpectrum(squares[0].clamp_min(0).sqrt().cpu(), basis[0])


@dataclass(frozen=True, slots=True)
class Leading:
    """The best approximations of a batch: ``up = U_k Σ_k``, ``down = V_kᵀ``.

    Attributes
    ----------
    up, down
        ``(batch, m, k)`` and ``(batch, k, n)``, in the matrices' dtype and on their device.
    values
        The ``k`` largest singular values, ``(batch, k)``, float64, on the CPU.
    """

    up: Tensor
    down: Tensor
    values: Tensor

    def __getitem__(self, index: int) -> LowRank:
        return LowRank(self.up[index], self.down[index])


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
    grams = _grams(matrices)
    if shorter <= _SMALL or 3 * (rank + OVERSAMPLING) > shorter:
        squares, basis = eigh(grams)
    else:
        squares, basis, converged = leading_eigenvectors(grams, rank, seed=seed)
        for index in torch.nonzero(~converged).flatten().tolist():
            whole, vectors = eigh(grams[index : index + 1])
            squares[index], basis[index] = whole[0, :rank], vectors[0, :, :rank]
    values = squares[:, :rank].clamp_min(0).sqrt()
    up, down = _factors(matrices, values, basis[..., :rank])
    return Leading(up, down, values.cpu())


def best_approximation(matrix: Tensor, rank: int, *, seed: int) -> LowRank:
    """:func:`leading` of one matrix."""
    return leading(matrix[None], rank, seed=seed)[0]


def _grams(matrices: Tensor) -> Tensor:
    """``A Aᵀ`` or ``Aᵀ A``, whichever is smaller, in float64: ``(batch, s, s)``."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    batch, shorter, _ = wide.shape
    total = torch.zeros(batch, shorter, shorter, dtype=torch.float64, device=wide.device)
    step = max(1, _GRAM_CHUNK // max(1, batch * shorter))
    for start in range(0, wide.shape[-1], step):
        rows = wide[..., start : start + step].double()
        total.baddbmm_(rows, rows.mT)
    return total


def _factors(matrices: Tensor, values: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``U Σ`` and ``Vᵀ`` from the matrices, their values and the shorter side's vectors."""
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)  # a repeatable sign
    dtype = matrices.dtype
    if matrices.shape[1] > matrices.shape[2]:
        return matrices @ basis.to(dtype), basis.mT.to(dtype)  # U Σ = A V
    # A direction without length keeps its basis vector and gets a zero scale.
    inverse = torch.where(values > values[:, :1] * 1e-12, 1 / values.clamp_min(1e-300), 0)
    down = (basis * inverse.unsqueeze(-2)).to(dtype).mT @ matrices
    return (basis * values.unsqueeze(-2)).to(dtype), down


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


def tucker(tensor: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A CP-form convolution (Tucker in the two channel axes) by HOSVD.

    ``up (out, r)`` and ``down (r, in)`` span the leading directions of the two unfoldings;
    the core is the exact projection, ``core = upᵀ ×₁ T ×₂ down``.

    Parameters
    ----------
    tensor
        ``(out, in, *kernel)``.
    rank
        At most ``min(out, in)`` of it is used.

    Returns
    -------
    Tensor, Tensor, Tensor
        ``up``, ``core (r, r, *kernel)``, ``down``.
    """
    rank = min(rank, tensor.shape[0], tensor.shape[1])
    up = _left_vectors(tensor.flatten(1), rank, seed)
    down = _left_vectors(tensor.transpose(0, 1).flatten(1), rank, seed)
    core = torch.einsum("oi..., op, iq -> pq...", tensor, up, down)
    return up, core, down.T


def _left_vectors(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal leading left singular vectors."""
    basis: Tensor = torch.linalg.qr(best_approximation(matrix, rank, seed=seed).up).Q
    return basis
