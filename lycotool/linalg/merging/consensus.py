"""Add changes up, all elements or only those whose signs agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.linalg.merging.base import Consensus, Normalize, Settings

#: A sum of weights this close to zero is no divisor (mergekit's bound).
_NO_WEIGHT = 1e-8


def total(changes: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """``λ · Σ xᵢ``, divided by ``Σ wᵢ`` where the weights are to be normalised."""
    result = changes[0].clone()
    for change in changes[1:]:
        result += change
    weight = sum(weights)
    if settings.normalize == "weight" and abs(weight) >= _NO_WEIGHT:
        result /= weight
    return result.mul_(settings.scale)


def agreeing(changes: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """``λ · Σ xᵢ`` over the elements that have the elected sign, divided as settings say."""
    sign = _elected(changes, settings.consensus)
    result, divisor = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        agrees = change.sign() == sign
        result += torch.where(agrees, change, 0)
        divisor += agrees * _share(weight, settings.normalize)
    if settings.normalize != "none":
        result /= torch.where(divisor == 0, 1, divisor)
    return result.mul_(settings.scale)


def _elected(changes: Sequence[Tensor], consensus: Consensus) -> Tensor:
    """+1 or -1 for each element; a tie is +1."""
    votes = torch.zeros_like(changes[0])
    for change in changes:
        votes += change if consensus == "total" else change.sign()
    return torch.where(votes >= 0, 1, -1).to(votes.dtype)


def _share(weight: float, normalize: Normalize) -> float:
    return weight if normalize == "weight" else 1.0
