"""Leading eigenvectors of symmetric matrices by a Chebyshev-filtered subspace, in batches.

Only products with the matrices and decompositions of their small projections are needed, so a
batch of equal shapes costs a few large calls. A polynomial of degree ``d`` that is small on
``[0, a]`` and grows fast above it draws a subspace to the eigenvectors above ``a`` as ``d``
steps of a Krylov method would, without keeping their ``d`` blocks. Zhou, Saad, Tiago and
Chelikowsky, J. Comput. Phys. 219 (2006). Eigenvalues far above ``a`` are taken out of the
filter (deflated): it would drown the others in their rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.eigen import eigh

if TYPE_CHECKING:
    from torch import Tensor

#: Columns beyond the wanted ones: enough for the filter's edge to lie below them.
OVERSAMPLING = 16

#: Growth of the captured energy in one sweep, as a share of the energy left out, at which
#: the subspace is good enough. A sweep gains at least ten times less than the one before, so
#: what is still missing is below 0.02 % of what is left, and the error of the result below 0.01 %.
_TOLERANCE = 2e-3

#: Eigenvalues above this many times the filter's edge are deflated.
_HEAD = 4.0

#: Degree of the filter. With ``_HEAD`` it amplifies by at most ``cosh(8·acosh(2·4 - 1))``, 7e8,
#: so what it draws in by rounding is 1e-7 of a vector.
_DEGREE = 8

_SWEEPS = 6


def leading_eigenvectors(grams: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest eigenvalues of positive semidefinite matrices.

    Parameters
    ----------
    grams
        ``(batch, n, n)``, float64.
    seed
        For the random start; equal seeds give equal results on one device.

    Returns
    -------
    Tensor
        Eigenvalues, descending, ``(batch, count)``.
    Tensor
        Orthonormal eigenvectors in columns, ``(batch, n, count)``.
    Tensor
        Whether each matrix converged: the sum of what its eigenvalues leave of the trace is
        within 0.02 % of the least possible.
    """
    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    width = min(count + OVERSAMPLING, grams.shape[-1])
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(grams.shape[-1], width, generator=generator, dtype=grams.dtype)
    values, vectors, images = _ritz(grams, _orthonormal(grams @ start.to(grams.device)))
    captured = values[:, :count].sum(-1)
    converged = torch.zeros_like(captured, dtype=torch.bool)
    for _ in range(_SWEEPS):
        values, vectors, images = _ritz(grams, _orthonormal(_filtered(grams, values, vectors, images)))
        energy = values[:, :count].sum(-1)
        # Sums of float32 squares know their total no better than this.
        left = torch.maximum(trace - energy, 1e-7 * trace)
        converged = energy - captured <= _TOLERANCE * left
        captured = energy
        if bool(converged.all()):
            break
    return values[:, :count], vectors[..., :count], converged


def _filtered(grams: Tensor, values: Tensor, vectors: Tensor, images: Tensor) -> Tensor:
    """One sweep: the filter where eigenvalues are near its edge, a power step above."""
    largest = values[:, :1].clamp_min(torch.finfo(values.dtype).tiny)
    edge = torch.maximum(values[:, -1:], 1e-14 * largest)
    is_head = values > _HEAD * edge
    head = vectors * is_head.unsqueeze(-2)
    weights = (values * is_head).unsqueeze(-1)
    half = (edge / 2).unsqueeze(-1)

    def shifted(block: Tensor) -> Tensor:
        """``(D - a/2) / (a/2)`` times a block, ``D`` the deflated matrix: [0, a] goes to [-1, 1]."""
        product = torch.baddbmm(grams @ block, head, weights * (head.mT @ block), alpha=-1)
        return product / half - block

    before, block = vectors, shifted(vectors)
    for _ in range(_DEGREE - 1):
        before, block = block, 2 * shifted(block) - before
    return torch.where(is_head.unsqueeze(-2), images, block)


def _ritz(grams: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of the projection on a basis, their vectors, and the matrix times those."""
    images = grams @ basis
    projected = basis.mT @ images
    values, turn = eigh((projected + projected.mT) / 2)
    return values.clamp_min(0), basis @ turn, images @ turn


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, by two Cholesky decompositions.

    Householder QR of a batch runs matrix by matrix on a GPU and takes fifty times as long; it
    is the way out where the columns are too nearly dependent. Yamamoto, Nakatsukasa, Yanagisawa
    and Fukaya, Electron. Trans. Numer. Anal. 44 (2015).
    """
    columns = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True).clamp_min(1e-300)
    basis = columns
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(basis.mT @ basis)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        # Above a condition of about 1e7 the Gram matrix has lost the small directions.
        is_lost = (info != 0) | ~(pivots.amin(-1) >= 1e-7 * pivots.amax(-1))
        if bool(is_lost.any()):
            break
        basis = torch.linalg.solve_triangular(factor.mT, basis, upper=True, left=False)
    else:
        return basis
    exact: Tensor = torch.linalg.qr(columns).Q
    return exact
