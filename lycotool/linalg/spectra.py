"""Singular values and optimal truncations, from factors and never from the dense matrix.

Everything here works on ``(out, in·kernel)`` matrices given by factors. Truncating at rank
``k`` is optimal in Frobenius and spectral norm (Eckart-Young); the squared error is the sum
of the squared values left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.eigen import eigh
from lycotool.linalg.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grams:
    """All that a product's singular values depend on: small, where the factors are long.

    Attributes
    ----------
    left, right
        ``upᵀ up`` and ``down downᵀ``, ``(r, r)``, float64.
    bound
        ``min(r, out, in·kernel)``: how many values there can be.
    """

    left: Tensor
    right: Tensor
    bound: int


def grams(low: LowRank) -> Grams:
    """The Grams of ``up @ down`` (without a core: fold it first)."""
    return stacked_grams(low.up[None], low.down[None])[0]


def stacked_grams(ups: Tensor, downs: Tensor) -> list[Grams]:
    """:func:`grams` of products of equal shapes, ``(batch, out, r)`` and ``(batch, r, in·kernel)``."""
    up, down = ups.double(), downs.double()
    bound = min(*up.shape[1:], down.shape[2])
    return [Grams(left, right, bound) for left, right in zip(up.mT @ up, down @ down.mT, strict=True)]


@dataclass(frozen=True, slots=True)
class FactorSpectrum:
    """The spectrum of ``up @ down``.

    With ``G = upᵀ up``, ``H = down downᵀ`` (float64) and ``G = F Fᵀ``, the symmetric matrix
    ``Fᵀ H F = X Σ² Xᵀ`` holds the squared singular values, and

    ``V = downᵀ A``, ``U Σ = up B`` with ``A = F X Σ⁻¹``, ``B = H A``.

    Nothing is divided by the small eigenvalues of either factor, so rank-deficient factors
    are no special case. Squaring in float64 leaves values down to about 1e-8 of the largest,
    which is below the rounding of float32 factors.

    Attributes
    ----------
    values
        Singular values, float64, descending, on the CPU.
    mix_up, mix_down
        ``B`` and ``A``, ``(r, values)``.
    """

    values: Tensor
    mix_up: Tensor
    mix_down: Tensor

    def truncated(self, rank: int, factors: LowRank) -> LowRank:
        """``up = U_k Σ_k``, ``down = V_kᵀ`` from the factors the Grams came from."""
        up, down = truncated_stack([self], rank, factors.up[None], factors.down[None])
        return LowRank(up[0], down[0])


def truncated_stack(
    spectra: Sequence[FactorSpectrum], rank: int, ups: Tensor, downs: Tensor
) -> tuple[Tensor, Tensor]:
    """:meth:`FactorSpectrum.truncated` of products of equal shapes, stacked as they are."""
    mix_up, mix_down = (
        torch.stack([getattr(one, side)[:, :rank] for one in spectra]).to(ups.device, ups.dtype)
        for side in ("mix_up", "mix_down")
    )
    return ups @ mix_up, mix_down.mT @ downs


def spectra(parts: Sequence[Grams]) -> list[FactorSpectrum]:
    """Spectra of many products at once; equal inner ranks share a batch."""
    found: dict[int, FactorSpectrum] = {}
    by_rank: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        by_rank.setdefault(part.left.shape[0], []).append(index)
    for indices in by_rank.values():
        left, right = (torch.stack([getattr(parts[i], side) for i in indices]) for side in ("left", "right"))
        on_device, mix_up, mix_down = _mixing(left, right)
        values = on_device.cpu()
        for row, i in enumerate(indices):
            n = parts[i].bound
            found[i] = FactorSpectrum(values[row, :n], mix_up[row, :, :n], mix_down[row, :, :n])
    return [found[index] for index in range(len(parts))]


def _mixing(grams_left: Tensor, grams_right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ``, ``B`` and ``A`` of :class:`FactorSpectrum` for a batch of ``(r, r)`` Grams."""
    root = root_of(grams_left)
    squares, directions = eigh(root.mT @ grams_right @ root)
    values = roots_above_noise(squares)
    keep = values > 0
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1), 0)
    mix_down = (root @ directions) * inverse.unsqueeze(-2)
    mix_down = mix_down * _signs(mix_down)
    return values, grams_right @ mix_down, mix_down


def root_of(grams: Tensor) -> Tensor:
    """``F`` with ``G = F Fᵀ`` for a batch of Grams, from their eigenvectors."""
    powers, basis = eigh(grams)
    root: Tensor = basis * powers.clamp_min(0).sqrt().unsqueeze(-2)
    return root


def roots_above_noise(squares: Tensor) -> Tensor:
    """Singular values from their squares ``(batch, n)``, descending.

    What is below the rounding of the squares is noise, and so is its direction: zero.
    """
    noise = 16 * squares.shape[-1] * torch.finfo(squares.dtype).eps
    values: Tensor = torch.where(squares > noise * squares[..., :1], squares.clamp_min(0), 0).sqrt()
    return values


def _signs(columns: Tensor) -> Tensor:
    """Signs that make each column's largest entry positive, so that results are repeatable."""
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


@dataclass(frozen=True, slots=True)
class KroneckerSpectrum:
    """The spectrum of ``first ⊗ second`` from the SVDs of its parts.

    ``(U₁ Σ₁ V₁ᵀ) ⊗ (U₂ Σ₂ V₂ᵀ) = (U₁ ⊗ U₂)(Σ₁ ⊗ Σ₂)(V₁ ⊗ V₂)ᵀ``: the values are all
    products, sorted; a truncation forms only the columns it keeps.
    """

    values: Tensor
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    order: Tensor

    def truncated(self, rank: int) -> LowRank:
        """``up = U_k Σ_k``, ``down = V_kᵀ``: Kronecker products of the kept columns alone."""
        count = self.second[0].shape[1]
        chosen = self.order[:rank]
        i, j = chosen // count, chosen % count
        up = _columns_kron(self.first[0][:, i], self.second[0][:, j])
        down = _columns_kron(self.first[1][:, i], self.second[1][:, j]).T
        return LowRank(up, down)


def _columns_kron(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product: ``(m, k)`` and ``(n, k)`` to ``(m·n, k)``."""
    return (a[:, None, :] * b[None, :, :]).flatten(0, 1)


def spectrum_of_kronecker(first: LowRank, second: LowRank) -> KroneckerSpectrum:
    """The spectrum of the Kronecker product of two factored matrices."""
    one, two = spectra([grams(first), grams(second)])
    products = (one.values[:, None] * two.values[None, :]).flatten()
    values, order = products.sort(descending=True, stable=True)
    bound = min(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    low1, low2 = one.truncated(len(one.values), first), two.truncated(len(two.values), second)
    return KroneckerSpectrum(
        values[:bound],
        (low1.up, low1.down.T),
        (low2.up, low2.down.T),
        order[:bound].to(first.up.device),
    )
