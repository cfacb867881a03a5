"""Leave out elements of a change, by magnitude or at random.

Each works on one tensor, the change of one weight or bias: what is large is large beside the
others of the same layer, as in PEFT's and mergekit's implementations of these methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.linalg.merging.base import Stream


def largest(tensor: Tensor, density: float) -> Tensor:
    """The ``int(density · n)`` elements of largest magnitude, at least one; zero elsewhere.

    Of equal ones the first are kept.
    """
    return tensor * _largest_mask(tensor, _share(tensor, density))


def without_extremes(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """Without the ``int(gamma · n)`` largest elements, then the largest up to ``density`` of all.

    Where both cannot be had, fewer of the largest are left out.
    """
    kept = _share(tensor, density)
    outliers = min(int(gamma * tensor.numel()), tensor.numel() - kept)
    mask = _largest_mask(tensor, kept + outliers) ^ _largest_mask(tensor, outliers)
    return tensor * mask


def _share(tensor: Tensor, density: float) -> int:
    return min(tensor.numel(), max(1, int(density * tensor.numel())))


def _largest_mask(tensor: Tensor, count: int) -> Tensor:
    """Where the ``count`` elements of largest magnitude are."""
    size = tensor.numel()
    if count == size:
        return torch.ones_like(tensor, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    flat = tensor.abs().flatten()
    least = flat.kthvalue(size - count + 1).values
    mask = flat >= least
    if int(mask.sum()) > count:  # several are as large as the least
        above, equal = flat > least, flat == least
        mask = above | (equal & (equal.cumsum(0) <= count - int(above.sum())))
    return mask.reshape(tensor.shape)


def drop_and_rescale(tensor: Tensor, density: float, stream: Stream) -> Tensor:
    """Each element kept with probability ``density``, and divided by it."""
    if density >= 1:
        return tensor
    return torch.where(stream.uniform(tensor) < density, tensor / density, 0)


def drop_by_rank(tensor: Tensor, density: float, epsilon: float, stream: Stream) -> Tensor:
    """Each element kept with a probability that grows with its magnitude, and divided by it.

    Within a row the probability runs from ``density - epsilon`` for the smallest element to
    ``density + epsilon`` for the largest, evenly by rank. Vectors are one row.
    """
    if density >= 1:
        return tensor
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    width = rows.shape[1]
    order = rows.abs().argsort(dim=1, stable=True)
    places = torch.arange(width, device=tensor.device, dtype=tensor.dtype).expand_as(rows)
    rank = torch.empty_like(rows).scatter_(1, order, places)
    keep = density - epsilon + rank * (2 * epsilon / max(1, width - 1))
    if width == 1:
        keep = torch.full_like(rows, density)
    chosen = stream.uniform(rows) < keep
    return torch.where(chosen, rows / keep, 0).reshape(tensor.shape)
