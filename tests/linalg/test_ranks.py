"""Rank rules against their definitions, budgets against all possible allocations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from examples import many
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.linalg import ranks

often = settings(deadline=None, max_examples=50)
sometimes = settings(deadline=None, max_examples=20)

#: Shares and totals are floating sums of at most 12 terms; the rules forgive 1e-12 of the total.
ROUNDING = 2e-12


def spectrum_of(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)


values_in_order = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e3), st.sampled_from([1.0, 2.0, 2.0, 5.0])),
    min_size=1,
    max_size=12,
).map(spectrum_of)
shares = st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.5, 0.9, 0.99, 1.0]))


def reached(weights: list[float], share: float) -> int:
    """Smallest count ``n >= 1`` whose exact sum is ``share`` of the exact sum of all."""
    total = math.fsum(weights)
    return next(n for n in range(1, len(weights) + 1) if math.fsum(weights[:n]) >= share * total)


def assert_smallest(rank: int, weights: list[float], share: float) -> None:
    """``rank`` meets the target, and one less does not; sums that tie may round either way."""
    total = math.fsum(weights)
    assert math.fsum(weights[:rank]) >= share * total * (1 - ROUNDING)
    assert rank == 1 or math.fsum(weights[: rank - 1]) < share * total
    if abs(math.fsum(weights[:rank]) - share * total) > ROUNDING * total:
        assert rank <= reached(weights, share)


@many
@given(values=values_in_order, share=shares)
def test_cumulative_is_the_fewest_values_with_that_sum(values: torch.Tensor, share: float) -> None:
    assert_smallest(ranks.cumulative(values, share), values.tolist(), share)


@many
@given(values=values_in_order, share=shares)
def test_fro_is_the_fewest_values_with_that_norm(values: torch.Tensor, share: float) -> None:
    assert_smallest(ranks.fro(values, share), [v * v for v in values.tolist()], share**2)


@many
@given(values=values_in_order, over=st.floats(1, 1e4))
def test_ratio_counts_values_of_the_largest_over_the_parameter(values: torch.Tensor, over: float) -> None:
    listed = values.tolist()
    expected = sum(v >= listed[0] / over for v in listed) if listed[0] else 1
    assert ranks.ratio(values, over) == expected


@many
@given(values=values_in_order, least=st.floats(0, 1e3))
def test_threshold_counts_values_above_it(values: torch.Tensor, least: float) -> None:
    assert ranks.threshold(values, least) == max(1, sum(v > least for v in values.tolist()))


@many
@given(values=values_in_order, rank=st.integers(1, 30))
def test_fixed_is_the_rank_as_far_as_there_are_values(values: torch.Tensor, rank: int) -> None:
    assert ranks.fixed(values, rank) == min(rank, len(values))


@many
@given(values=values_in_order, least=st.floats(0, 1))
def test_relative_decrease_stops_at_the_first_fall(values: torch.Tensor, least: float) -> None:
    listed = values.tolist()
    falls = [n for n in range(1, len(listed)) if listed[n] < least * listed[n - 1]]
    if listed[0]:
        assert ranks.relative_decrease(values, least) == (falls[0] if falls else len(listed))


def assert_farthest(rank: int, distances: np.ndarray) -> None:
    """The first of the largest distances; those closer than rounding count as equal."""
    assert distances[rank - 1] >= distances.max() - ROUNDING
    assert bool((distances[: rank - 1] <= distances[rank - 1] + ROUNDING).all())


def unit(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min())


@many
@given(values=values_in_order)
def test_knee_is_farthest_from_the_chord(values: torch.Tensor) -> None:
    listed = values.numpy()
    if len(listed) == 1 or listed[0] == listed[-1]:
        assert ranks.knee(values) == 1  # no curve, no knee
        return
    assert_farthest(ranks.knee(values), np.abs(unit(np.arange(len(listed))) + unit(listed) - 1))


@many
@given(values=values_in_order)
def test_cumulative_knee_is_farthest_from_the_chord_of_the_sums(values: torch.Tensor) -> None:
    sums = np.cumsum(values.numpy())
    if sums[0] == sums[-1]:
        assert ranks.cumulative_knee(values) == 1  # the first value is all there is
        return
    distances = np.abs(unit(sums) - unit(np.arange(len(sums))))
    assert_farthest(ranks.cumulative_knee(values), distances)


def test_knees_of_a_drawn_curve() -> None:
    """Two large values and a flat tail: by hand, the bend is where the tail begins."""
    values = spectrum_of([10.0, 9.0, 1.0, 0.9, 0.8, 0.7])
    # x = 0, .2, .4, ...; y = 1, .892, .032, ...: |x + y - 1| is largest at the third, .568.
    assert ranks.knee(values) == 3
    # Sums 10, 19, 20, ...: unit y = 0, .726, .806, .879 at x = 0, .2, .4, .6: largest at the second.
    assert ranks.cumulative_knee(values) == 2


# --- what all rules have in common ---------------------------------------------------------

PARAMETERS: dict[str, st.SearchStrategy[float]] = {
    "fixed": st.integers(1, 30).map(float),
    "threshold": st.floats(0, 1e4),
    "sv_ratio": st.floats(1, 1e6),
    "sv_cumulative": shares,
    "sv_fro": shares,
    "sv_knee": st.just(0.0),
    "sv_cumulative_knee": st.just(0.0),
    "sv_rel_decrease": shares,
}
GROWING = ("fixed", "sv_ratio", "sv_cumulative", "sv_fro")
SHRINKING = ("threshold", "sv_rel_decrease")


def test_every_rule_is_tested() -> None:
    assert set(PARAMETERS) == set(ranks.RULES)


@pytest.mark.parametrize("name", PARAMETERS)
@sometimes
@given(data=st.data(), values=values_in_order)
def test_rank_is_from_1_to_the_number_of_values(name: str, data: st.DataObject, values: torch.Tensor) -> None:
    rank = ranks.RULES[name](values, data.draw(PARAMETERS[name]))
    assert type(rank) is int
    assert 1 <= rank <= len(values)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "fixed"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nothing_but_zeros_is_rank_1(name: str, count: int) -> None:
    parameter = {"sv_ratio": 5.0}.get(name, 0.5)
    assert ranks.RULES[name](torch.zeros(count, dtype=torch.float64), parameter) == 1


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("value", [1e-30, 0.3, 1e30])
def test_a_single_value_is_rank_1(name: str, value: float) -> None:
    parameter = {"sv_ratio": 5.0, "fixed": 7.0}.get(name, 0.5)
    assert ranks.RULES[name](torch.tensor([value], dtype=torch.float64), parameter) == 1


@pytest.mark.parametrize("name", [*GROWING, *SHRINKING])
@sometimes
@given(data=st.data(), values=values_in_order)
def test_rank_follows_the_parameter(name: str, data: st.DataObject, values: torch.Tensor) -> None:
    low, high = sorted(data.draw(st.tuples(PARAMETERS[name], PARAMETERS[name])))
    first, second = ranks.RULES[name](values, low), ranks.RULES[name](values, high)
    assert first <= second if name in GROWING else first >= second


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "threshold"])
@sometimes
@given(data=st.data(), values=values_in_order, power=st.sampled_from([-40, -3, 1, 50]))
def test_a_scale_changes_no_rank(name: str, data: st.DataObject, values: torch.Tensor, power: int) -> None:
    """Alpha scales all values alike; a power of two does so without rounding."""
    parameter = data.draw(PARAMETERS[name])
    assert ranks.RULES[name](values, parameter) == ranks.RULES[name](values * 2.0**power, parameter)


# --- sd-scripts' ranks ---------------------------------------------------------------------


def kohya(method: str, values: list[int], parameter: float, *, count: int, cap: int) -> int:
    """sd-scripts' ranks, restated from the table of their rules over all ``count`` values.

    ``k = clamp(n, 1, count - 1) + 1`` with the ``n`` of the method, the cap last, and rank 1 for
    a module whose largest value is at most 1e-6.
    """
    dense = np.zeros(count)
    dense[: len(values)] = values
    if dense[0] <= 1e-6:
        return 1
    if method == "sv_ratio":
        n = np.count_nonzero(dense > dense[0] / parameter)
    elif method == "sv_cumulative":
        n = np.searchsorted(np.cumsum(dense) / dense.sum(), parameter) + 1
    else:
        n = np.searchsorted(np.cumsum(dense**2) / (dense**2).sum(), parameter**2) + 1
    return min(int(np.clip(n, 1, max(count - 1, 1))) + 1, cap)


@pytest.mark.parametrize("method", ["sv_ratio", "sv_cumulative", "sv_fro"])
@often
@given(
    # Whole numbers: their sums are exact in any order, so both sides divide the same numbers.
    values=st.lists(st.integers(0, 500), min_size=1, max_size=10),
    zeros=st.integers(0, 5),
    cap=st.integers(1, 20),
    data=st.data(),
)
def test_kohya_rank_is_that_of_the_restatement(
    method: str, values: list[int], zeros: int, cap: int, data: st.DataObject
) -> None:
    ordered = sorted(values, reverse=True)
    parameter = data.draw(st.floats(1.01, 100) if method == "sv_ratio" else st.floats(0.01, 1.0))
    count = len(ordered) + zeros
    found = ranks.kohya_rank(
        method, torch.tensor(ordered, dtype=torch.float64), parameter, count=count, cap=cap
    )
    assert found == kohya(method, ordered, parameter, count=count, cap=cap)


@pytest.mark.parametrize("method", ["sv_cumulative", "sv_fro"])
@often
@given(values=st.lists(st.integers(1, 500), min_size=1, max_size=10), share=st.floats(0.01, 0.999))
def test_kohya_keeps_more_than_the_target_needs(method: str, values: list[int], share: float) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    needed = ranks.RULES[method](spectrum, share)
    assert ranks.kohya_rank(method, spectrum, share, count=100, cap=1000) > needed
    assert ranks.kohya_rank(method, spectrum, share, count=100, cap=needed) == needed


def test_kohya_keeps_one_too_many() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    for method, parameter, needed in (
        ("sv_ratio", 1.9, 2),  # above 4 / 1.9 = 2.1
        ("sv_cumulative", 0.65, 2),  # 7 of 10
        ("sv_fro", 0.9, 2),  # 25 of 30 is 0.91²
    ):
        assert ranks.RULES[method](values, parameter) == needed
        assert ranks.kohya_rank(method, values, parameter, count=9, cap=9) == needed + 1


@pytest.mark.parametrize("largest", [0.0, 1e-7, 1e-6])
def test_kohya_keeps_rank_1_of_a_module_of_zeros(largest: float) -> None:
    values = torch.full((4,), largest, dtype=torch.float64)
    assert ranks.kohya_rank("sv_fro", values, 0.9, count=10, cap=8) == 1


def test_kohya_has_no_other_method() -> None:
    with pytest.raises(KeyError):
        ranks.kohya_rank("sv_knee", torch.ones(3), 0.5, count=3, cap=3)


# --- one budget over many modules ----------------------------------------------------------
#
# Values are whole numbers, so that squares and their sums are exact and ties are ties.


@st.composite
def modules(draw: st.DrawFn, *, equal_costs: bool = False) -> tuple[list[torch.Tensor], list[int]]:
    count = draw(st.integers(1, 4))
    spectra = [
        torch.tensor(
            sorted(draw(st.lists(st.integers(0, 30), min_size=1, max_size=4)), reverse=True),
            dtype=torch.float64,
        )
        for _ in range(count)
    ]
    cost = st.integers(1, 9)
    costs = [draw(cost)] * count if equal_costs else [draw(cost) for _ in range(count)]
    return spectra, costs


def lost(spectra: list[torch.Tensor], chosen: tuple[int, ...]) -> float:
    return sum(float(values[rank:].square().sum()) for values, rank in zip(spectra, chosen, strict=True))


def spent(costs: list[int], chosen: tuple[int, ...]) -> int:
    return sum(cost * rank for cost, rank in zip(costs, chosen, strict=True))


def all_allocations(spectra: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(1, len(values) + 1) for values in spectra)))


Case = tuple[list[torch.Tensor], list[int]]


def limits_of(case: Case, draw: Callable[[st.SearchStrategy[int]], int]) -> int:
    spectra, costs = case
    most = spent(costs, tuple(len(values) for values in spectra))
    return draw(st.integers(sum(costs), most + 3))


@many
@given(case=modules(), error=st.one_of(st.floats(0, 0.99), st.sampled_from([0.0, 0.5])))
def test_error_is_met_within_one_rank_of_the_fewest_bytes(case: Case, error: float) -> None:
    """Exactly what greedy guarantees.

    Each prefix of the greedy order loses least of all allocations of its size. The state
    before the last step did not meet the target, so nothing of its size or less does: the
    result is less than the cost of one rank above the optimum.
    """
    spectra, costs = case
    chosen = tuple(ranks.allocate(spectra, costs, error=error))
    total = sum(float(values.square().sum()) for values in spectra)
    allowed = error**2 * total
    assert all(1 <= rank <= len(values) for rank, values in zip(chosen, spectra, strict=True))
    assert lost(spectra, chosen) <= allowed
    fewest = min(spent(costs, other) for other in all_allocations(spectra) if lost(spectra, other) <= allowed)
    raised = [cost for cost, rank in zip(costs, chosen, strict=True) if rank > 1]
    assert spent(costs, chosen) < fewest + max(raised, default=1)


@many
@given(case=modules(equal_costs=True), error=st.floats(0, 0.99))
def test_error_with_equal_costs_takes_the_fewest_bytes(case: Case, error: float) -> None:
    spectra, costs = case
    chosen = tuple(ranks.allocate(spectra, costs, error=error))
    allowed = error**2 * sum(float(values.square().sum()) for values in spectra)
    fewest = min(spent(costs, other) for other in all_allocations(spectra) if lost(spectra, other) <= allowed)
    assert spent(costs, chosen) == fewest


@many
@given(case=modules(), data=st.data())
def test_budget_is_kept_and_used(case: Case, data: st.DataObject) -> None:
    spectra, costs = case
    budget = limits_of(case, data.draw)
    chosen = ranks.allocate(spectra, costs, budget=budget)
    room = budget - spent(costs, tuple(chosen))
    assert room >= 0
    assert all(1 <= rank <= len(values) for rank, values in zip(chosen, spectra, strict=True))
    for values, cost, rank in zip(spectra, costs, chosen, strict=True):
        if rank < len(values) and values[rank] > 0:
            assert cost > room  # nothing of worth would still fit


@many
@given(case=modules(), data=st.data())
def test_budget_loses_no_more_than_one_rank_above_the_optimum(case: Case, data: st.DataObject) -> None:
    """A knapsack: greedy is within the first value that no longer fitted of the optimum.

    Up to there it is optimal for the bytes it has used, and the bytes then left are fewer
    than that value's, so no allocation can save more with them than that value.
    """
    spectra, costs = case
    budget = limits_of(case, data.draw)
    chosen = tuple(ranks.allocate(spectra, costs, budget=budget))
    least = min(lost(spectra, other) for other in all_allocations(spectra) if spent(costs, other) <= budget)
    following = [
        float(values[rank]) ** 2 for values, rank in zip(spectra, chosen, strict=True) if rank < len(values)
    ]
    assert lost(spectra, chosen) <= least + max(following, default=0.0)


@many
@given(case=modules(), data=st.data())
def test_no_rank_is_better_given_to_a_module_that_is_no_dearer(case: Case, data: st.DataObject) -> None:
    spectra, costs = case
    chosen = ranks.allocate(spectra, costs, budget=limits_of(case, data.draw))
    for a, b in itertools.permutations(range(len(spectra)), 2):
        if chosen[a] > 1 and chosen[b] < len(spectra[b]) and costs[b] <= costs[a]:
            assert float(spectra[b][chosen[b]]) <= float(spectra[a][chosen[a] - 1])


@many
@given(case=modules(equal_costs=True), data=st.data())
def test_budget_with_equal_costs_loses_least(case: Case, data: st.DataObject) -> None:
    spectra, costs = case
    budget = limits_of(case, data.draw)
    chosen = tuple(ranks.allocate(spectra, costs, budget=budget))
    least = min(lost(spectra, other) for other in all_allocations(spectra) if spent(costs, other) <= budget)
    assert lost(spectra, chosen) == least


@many
@given(case=modules(), data=st.data())
def test_a_prefix_of_the_order_loses_least_for_its_bytes(case: Case, data: st.DataObject) -> None:
    """Where the error target ends is a prefix, so no allocation of its size loses less."""
    spectra, costs = case
    chosen = tuple(ranks.allocate(spectra, costs, error=data.draw(st.floats(0, 0.99))))
    size = spent(costs, chosen)
    least = min(lost(spectra, other) for other in all_allocations(spectra) if spent(costs, other) <= size)
    assert lost(spectra, chosen) == least


def test_a_budget_below_rank_1_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="12 bytes are needed for rank 1 of every module"):
        ranks.allocate([torch.ones(2), torch.ones(3)], [5, 7], budget=11)


def test_bytes_go_where_they_save_most() -> None:
    """By hand: 9 for 1 byte, then 16 for 2; 25 for 4 is the worst of the three."""
    spectra = [torch.tensor([9.0, 5.0]), torch.tensor([9.0, 3.0]), torch.tensor([9.0, 4.0])]
    costs = [4, 1, 2]
    assert ranks.allocate(spectra, costs, budget=7 + 1) == [1, 2, 1]
    assert ranks.allocate(spectra, costs, budget=7 + 3) == [1, 2, 2]
    assert ranks.allocate(spectra, costs, budget=7 + 6) == [1, 2, 2]
    assert ranks.allocate(spectra, costs, budget=7 + 7) == [2, 2, 2]


def test_zeros_get_no_bytes() -> None:
    spectra = [torch.tensor([3.0, 0.0, 0.0]), torch.zeros(3)]
    assert ranks.allocate(spectra, [1, 1], budget=100) == [1, 1]
    assert ranks.allocate(spectra, [1, 1], error=0.0) == [1, 1]
