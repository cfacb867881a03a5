"""How many singular values to keep: one function per rule, and one budget over many modules.

Every rule returns the smallest rank that meets its target, at least 1 and at most the
number of values. ``values`` are descending.

The ``kohya_*`` functions give what sd-scripts' ``resize_lora.py`` gives: it adds 1 to a
count that it has named an index, so it keeps one value more than its target needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: ``(values, parameter) -> rank``.
RankRule = Callable[["Tensor", float], int]


def fixed(values: Tensor, rank: float) -> int:
    """``rank`` itself, as far as there are values."""
    return max(1, min(int(rank), len(values)))


def threshold(values: Tensor, least: float) -> int:
    """Values above ``least``."""
    return _bounded(int((values > least).sum()), values)


def ratio(values: Tensor, largest_over: float) -> int:
    """Values of at least the largest divided by ``largest_over`` (``sv_ratio``)."""
    if not len(values) or values[0] == 0:
        return 1
    return _bounded(int((values >= values[0] / largest_over).sum()), values)


def cumulative(values: Tensor, share: float) -> int:
    """Fewest values whose sum is ``share`` of the sum of all (``sv_cumulative``, quantile)."""
    return _reaching(values, share)


def fro(values: Tensor, share: float) -> int:
    """Fewest values that keep ``share`` of the Frobenius norm (``sv_fro``)."""
    return _reaching(values.square(), share**2)


def knee(values: Tensor, unused: float = 0) -> int:
    """The value farthest from the line between the first and the last (``sv_knee``)."""
    x, y = _unit(torch.arange(len(values), dtype=values.dtype)), _unit(values)
    return _bounded(int((x + y - 1).abs().argmax()) + 1, values)


def cumulative_knee(values: Tensor, unused: float = 0) -> int:
    """The knee of the running sum (``sv_cumulative_knee``)."""
    if not values[1:].any():
        return 1
    x, y = _unit(torch.arange(len(values), dtype=values.dtype)), _unit(values.cumsum(0))
    return _bounded(int((y - x).abs().argmax()) + 1, values)


def relative_decrease(values: Tensor, least: float) -> int:
    """Values before the first that falls below ``least`` times its predecessor."""
    if len(values) < 2:
        return _bounded(1, values)
    drops = values[1:] < least * values[:-1]
    return _bounded(int(drops.int().argmax()) + 1 if drops.any() else len(values), values)


def _bounded(count: int, values: Tensor) -> int:
    """At least 1 and at most all; nothing but zeros is rank 1 whatever the rule says."""
    if not len(values) or values[0] == 0:
        return 1
    return max(1, min(count, len(values)))


def _reaching(weights: Tensor, share: float) -> int:
    """Fewest leading weights whose sum is ``share`` of the total."""
    running = weights.cumsum(0)
    if not len(weights) or running[-1] == 0:
        return 1
    # A total is reached when only rounding is missing.
    enough = share * running[-1] * (1 - 1e-12)
    return _bounded(int((running < enough).sum()) + 1, weights)


def _unit(x: Tensor) -> Tensor:
    """Scaled to run from 0 to 1."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


#: Rules by the names of ``--method``.
RULES: Mapping[str, RankRule] = {
    "fixed": fixed,
    "threshold": threshold,
    "sv_ratio": ratio,
    "sv_cumulative": cumulative,
    "sv_fro": fro,
    "sv_knee": knee,
    "sv_cumulative_knee": cumulative_knee,
    "sv_rel_decrease": relative_decrease,
}

#: The parameter of each rule: what it must be, and its range (open at the left).
PARAMETERS: Mapping[str, tuple[str, float, float]] = {
    "threshold": ("a number of at least 0", -1e-300, float("inf")),
    "sv_ratio": ("a number of at least 1", 1 - 1e-15, float("inf")),
    "sv_cumulative": ("a share above 0 and at most 1", 0, 1),
    "sv_fro": ("a share above 0 and at most 1", 0, 1),
    "sv_rel_decrease": ("a share above 0 and at most 1", 0, 1),
}


def kohya_rank(method: str, values: Tensor, parameter: float, *, count: int, cap: int) -> int:
    """The rank sd-scripts 48d368f picks for a dynamic method, its cap applied.

    It may exceed the number of nonzero values: that program decomposes the dense matrix,
    which has ``count = min(out, in·kernel)`` of them. Source: ``networks/resize_lora.py``,
    ``rank_resize`` and ``index_sv_*``.
    """
    if float(values[0]) <= 1e-6:
        return 1
    if method == "sv_ratio":
        index = int((values > values[0] / parameter).sum())
    elif method == "sv_cumulative":
        index = int(torch.searchsorted(values.cumsum(0) / values.sum(), parameter)) + 1
    elif method == "sv_fro":
        squares = values.square()
        index = int(torch.searchsorted(squares.cumsum(0) / squares.sum(), parameter**2)) + 1
    else:
        raise KeyError(method)
    return min(max(1, min(index, count - 1)) + 1, cap)


def allocate(
    spectra: Sequence[Tensor],
    costs: Sequence[int],
    *,
    caps: Sequence[int] | None = None,
    budget: int | None = None,
    error: float | None = None,
) -> list[int]:
    """Ranks for many modules together that lose least for their bytes.

    A module's next value saves ``σ²`` for ``cost`` bytes; the best ratio is taken first.
    As the values descend within each module, that order minimises ``Σ σ²_discarded`` for
    every budget it exactly uses up.

    Parameters
    ----------
    spectra
        Singular values of each module, scale included.
    costs
        Bytes one more rank takes in each module.
    caps
        The most each module may get.
    budget
        Bytes to spend, rank 1 of every module included; or
    error
        relative error ``√(Σ σ²_discarded / Σ σ²)`` to stay within.

    Raises
    ------
    ValueError
        If rank 1 of every module is over the budget already.
    """
    ranks = [1] * len(spectra)
    spent = sum(costs)
    if budget is not None and spent > budget:
        raise ValueError(f"{spent} bytes are needed for rank 1 of every module")
    squares = [values.square().tolist() for values in spectra]
    total = sum(map(sum, squares))
    discarded = sum(sum(values[1:]) for values in squares)
    allowed = None if error is None else error**2 * total
    limits = [len(values) for values in squares]
    if caps is not None:
        limits = [min(limit, cap) for limit, cap in zip(limits, caps, strict=True)]
    queue = [
        (-values[1] / cost, index)
        for index, (values, cost, limit) in enumerate(zip(squares, costs, limits, strict=True))
        if limit > 1
    ]
    heapq.heapify(queue)
    while queue and (allowed is None or discarded > allowed):
        gain, index = heapq.heappop(queue)
        if gain == 0:
            break  # nothing left but zeros
        if budget is not None and spent + costs[index] > budget:
            continue  # this module is done; a cheaper one may still fit
        spent += costs[index]
        discarded -= squares[index][ranks[index]]
        ranks[index] += 1
        if ranks[index] < limits[index]:
            heapq.heappush(queue, (-squares[index][ranks[index]] / costs[index], index))
    return ranks
