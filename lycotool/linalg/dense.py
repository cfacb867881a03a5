"""Singular values and best approximations of a dense matrix.

Two ways: exact, by the eigenvectors of the smaller Gram matrix in float64; and leading, by a
randomised block Krylov space (Musco and Musco, arXiv 1504.05477), which grows until the
energy it captures no longer does, and hands over to the exact way when it has grown too
large to be worth it. Plain subspace iteration is not enough here: the differences of
fine-tuned weights have flat tails, inside which it hardly converges. Never a full SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

#: Matrices whose smaller side is at most this long are always decomposed exactly. Measured:
#: an eigendecomposition of 1280 takes 80 ms on 16 CPU cores and 16 ms on an H100, where the
#: Krylov way takes 20 ms because its many small steps wait for each other.
_SMALL = {"cpu": 192, "cuda": 1280}

#: Columns beyond the rank that each Krylov block has.
_OVERSAMPLING = 8

#: Growth of the captured energy in one step, as a share of the energy left out, at which the
#: space is large enough. Each step gains less than the one before, so what is still missing
#: is of this size; the error of the result is half of it, 0.03 %.
_TOLERANCE = 6e-4


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
        # A direction without length keeps its basis vector and gets a zero scale.
        inverse = torch.where(values > values[:1] * 1e-12, 1 / values.clamp_min(1e-300), 0)
        chosen = self.basis[:, :rank]
        if matrix.shape[0] <= matrix.shape[1]:
            up = (chosen * values).to(matrix.dtype)
            down = (chosen * inverse).to(matrix.dtype).T @ matrix
            return LowRank(up, down)
        up = matrix @ chosen.to(matrix.dtype)  # U Σ = A V
        return LowRank(up, chosen.T.to(matrix.dtype))


def exact(matrix: Tensor) -> DenseSpectrum:
    """The whole spectrum, by the smaller Gram matrix in float64."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows = wide.double()
    squares, basis = torch.linalg.eigh(rows @ rows.T)
    basis = basis.flip(-1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    return DenseSpectrum(squares.flip(-1).clamp_min(0).sqrt().cpu(), basis)


def leading(matrix: Tensor, rank: int, *, seed: int) -> tuple[LowRank, Tensor]:
    """The best approximation of a rank, within 1.001 of the optimal error.

    Parameters
    ----------
    matrix
        ``(m, n)``.
    seed
        For the random start; equal seeds give equal results on one device.

    Returns
    -------
    LowRank
        ``up = U_k Σ_k``, ``down = V_kᵀ``.
    Tensor
        The ``rank`` largest singular values, float64, on the CPU.
    """
    rank = min(rank, *matrix.shape)
    width, shorter = rank + _OVERSAMPLING, min(matrix.shape)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    total = float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
    if shorter <= _SMALL.get(matrix.device.type, 192) or 3 * width > shorter or total == 0:
        return _by_exact(matrix, rank)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(wide.shape[1], width, generator=generator, dtype=torch.float32)
    basis = _orthonormal(wide @ start.to(wide))  # (shorter, width)
    projected = basis.T @ wide  # (width, longer)
    captured = float(torch.linalg.eigvalsh(projected.double() @ projected.double().T)[-rank:].sum())
    while 2 * basis.shape[1] <= shorter:
        block = wide @ projected[-width:].T
        for _ in range(3):  # a block that is all rounding has old directions in it again
            block = _orthonormal(block - basis @ (basis.T @ block))
        basis = torch.cat([basis, block], dim=1)
        projected = torch.cat([projected, block.T @ wide])
        small = projected.double()
        squares, turn = torch.linalg.eigh(small @ small.T)
        energy = float(squares[-rank:].sum())
        left = max(total - energy, 1e-7 * total)  # float32 products know no less
        if energy - captured <= _TOLERANCE * left:
            chosen = turn.flip(-1)[:, :rank].to(wide.dtype)
            return _oriented(basis @ chosen, chosen.T @ projected, squares.flip(-1)[:rank], matrix)
        captured = energy
    return _by_exact(matrix, rank)


def _by_exact(matrix: Tensor, rank: int) -> tuple[LowRank, Tensor]:
    spectrum = exact(matrix)
    return spectrum.truncated(rank, matrix), spectrum.values[:rank]


def _oriented(vectors: Tensor, scaled: Tensor, squares: Tensor, matrix: Tensor) -> tuple[LowRank, Tensor]:
    """Bring ``A ≈ vectors @ scaled`` (``scaled = Σ Vᵀ``) into the form of :class:`LowRank`."""
    values = squares.clamp_min(0).sqrt()
    signs = torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    vectors, scaled = vectors * signs, scaled * signs.T
    if matrix.shape[0] <= matrix.shape[1]:
        scale = values.clamp_min(1e-300).to(scaled.dtype)
        inverse = torch.where(values > values[:1] * 1e-12, 1 / scale.double(), 0).to(scaled.dtype)
        return LowRank(vectors * scale, scaled * inverse[:, None]), values.cpu()
    return LowRank(scaled.T, vectors.T), values.cpu()


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


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
    low, _ = leading(matrix, rank, seed=seed)
    return _orthonormal(low.up)
