"""Every merge method: the registry's claims, PEFT's answers, and the published formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft.utils import merge_utils as peft
from torch import Tensor

from lycotool.linalg.merging.base import Change, Method, Settings, Stream
from lycotool.linalg.merging.methods import DEFAULTS, METHODS, OPTIONS, methods_with

EPS = torch.finfo(torch.float32).eps
DENSE = [method for method in METHODS.values() if method.combine is not None]
SPARSE = [method for method in DENSE if "density" in method.options]
VOTING = [method for method in DENSE if "consensus" in method.options]

DEFAULT = Settings()
SHAPES = st.sampled_from([(7,), (1, 5), (4, 6), (3, 2, 3, 3)])
WEIGHTS = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)


def combine(method: Method, changes: Sequence[Change], settings: Settings = DEFAULT) -> Tensor:
    """The method with the division it has by default."""
    assert method.combine is not None
    return method.combine(changes, replace(settings, normalize=method.normalize))


def changes(
    shape: tuple[int, ...], weights: Sequence[float], *, seed: int = 0, density: float = 1.0, epsilon: float = 0.0,
    gamma: float = 0.0, dtype: torch.dtype = torch.float32,
) -> list[Change]:  # fmt: skip
    """Random changes at these weights, each with a stream of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Change(weight * torch.randn(shape, generator=generator, dtype=dtype), weight, density, gamma, epsilon,
               Stream(11, index))
        for index, weight in enumerate(weights)
    ]  # fmt: skip


def arrays(given: Sequence[Change]) -> list[NDArray[np.float64]]:
    return [change.tensor.double().numpy() for change in given]


def near(found: Tensor, expected: object, terms: int, size: float) -> None:
    """Equal up to the rounding of so many additions of numbers of that size."""
    error = np.abs(found.double().numpy() - np.asarray(expected)).max()
    assert error <= (terms + 2) * EPS * size


# --- the registry -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_each_entry_says_what_it_is(method: Method) -> None:
    assert METHODS[method.name] is method
    assert method.options <= set(OPTIONS)
    assert method.needs <= method.options
    assert (method.options - method.needs) - DEFAULTS.keys() <= {"normalize", "consensus", "along"}
    assert method.is_random == ("seed" in method.options)
    assert method.title
    assert method.summary
    assert method.citation
    if method.combine is not None:
        documentation = method.combine.__doc__ or ""
        assert (
            "arXiv" in documentation
            or "PEFT" in documentation
            or "mergekit" in documentation
            or method.name == "slerp"
        )


def test_every_option_belongs_to_a_method() -> None:
    assert all(methods_with(option) for option in OPTIONS)


# --- what holds for all of them ---------------------------------------------------------------


@pytest.mark.parametrize("method", DENSE, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(shape=SHAPES, seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_shape_and_dtype_are_kept_and_inputs_unchanged(
    method: Method, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    inputs = changes(shape, (0.7, -1.2), seed=seed, density=0.6, epsilon=0.2, gamma=0.1, dtype=dtype)
    before = [change.tensor.clone() for change in inputs]

    found = combine(method, inputs, Settings(along="rows"))

    assert found.shape == shape
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    assert all(torch.equal(old, change.tensor) for old, change in zip(before, inputs, strict=True))
    assert torch.equal(found, combine(method, inputs, Settings(along="rows")))


@pytest.mark.parametrize("method", DENSE, ids=lambda method: method.name)
def test_changes_of_zero_stay_zero(method: Method) -> None:
    nothing = [
        Change(torch.zeros(3, 4), weight, 0.5, 0.1, 0.2, Stream(1, i)) for i, weight in enumerate((1.0, 2.0))
    ]

    assert not combine(method, nothing).any()


@pytest.mark.parametrize(
    "method", [m for m in SPARSE if m.normalize == "none"], ids=lambda method: method.name
)
@given(shape=SHAPES, weights=st.lists(WEIGHTS, min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_density_1_is_the_plain_sum(
    method: Method, shape: tuple[int, ...], weights: list[float], seed: int
) -> None:
    inputs = changes(shape, weights, seed=seed)
    size = max(float(change.tensor.abs().max()) for change in inputs) * len(inputs)

    near(combine(method, inputs), sum(arrays(inputs)), len(inputs), size)


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
@given(shape=SHAPES, weight=WEIGHTS, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_one_adapter_at_density_1_is_itself(
    method: Method, shape: tuple[int, ...], weight: float, seed: int
) -> None:
    inputs = changes(shape, [weight], seed=seed)

    assert torch.equal(combine(method, inputs), inputs[0].tensor)


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
@given(
    shape=SHAPES,
    weights=st.lists(WEIGHTS, min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_order_does_not_matter(
    method: Method, shape: tuple[int, ...], weights: list[float], order: object, seed: int
) -> None:
    """Random methods draw by stream, which stays with its change. Sums differ by their rounding."""
    inputs = changes(shape, weights, seed=seed, density=0.6, gamma=0.1, epsilon=0.2, dtype=torch.float64)
    shuffled = list(inputs)
    order.shuffle(shuffled)  # type: ignore[attr-defined]

    difference = (combine(method, inputs) - combine(method, shuffled)).abs().max()
    assert difference <= 1e-14 * sum(float(change.tensor.abs().max()) for change in inputs) / 0.4


@pytest.mark.parametrize(
    "method", [m for m in DENSE if "lambda" in m.options], ids=lambda method: method.name
)
def test_lambda_scales_the_result(method: Method) -> None:
    inputs = changes((5, 6), (1.0, 0.5, -0.3), density=0.7, epsilon=0.1, gamma=0.1)
    whole, scaled = combine(method, inputs), combine(method, inputs, Settings(scale=-0.25))

    assert torch.equal(scaled, -0.25 * whole)  # a power of two, so exactly


# --- PEFT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@given(shape=SHAPES, weights=st.lists(WEIGHTS, min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_magnitude_prune_is_pefts(
    density: float, shape: tuple[int, ...], weights: list[float], seed: int
) -> None:
    inputs = changes(shape, weights, seed=seed, density=density)
    if int(density * inputs[0].tensor.numel()) == 0:
        density = 1 / inputs[0].tensor.numel() + 1e-9  # PEFT would keep nothing; one element stays here
    plain = [change.tensor / change.weight for change in inputs]

    expected = peft.magnitude_prune(plain, torch.tensor(weights), density)

    size = max(float(change.tensor.abs().max()) for change in inputs) * len(inputs)
    near(combine(METHODS["magnitude-prune"], inputs), expected.double().numpy(), len(inputs) + 2, size)


@pytest.mark.parametrize("consensus", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.7])
@given(shape=SHAPES, weight=st.floats(0.1, 2), count=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_ties_is_pefts_where_weights_are_equal(
    consensus: str, density: float, shape: tuple[int, ...], weight: float, count: int, seed: int
) -> None:
    """With unequal ones PEFT elects signs before it weighs, so that a weight of -1 votes as 1 does."""
    inputs = changes(shape, [weight] * count, seed=seed, density=density)
    if int(density * inputs[0].tensor.numel()) == 0:
        density = 1 / inputs[0].tensor.numel() + 1e-9
    plain = [change.tensor / weight for change in inputs]

    expected = peft.ties(plain, torch.full((count,), weight), density, consensus)

    found = combine(METHODS["ties"], inputs, Settings(consensus=consensus))
    near(
        found, expected.double().numpy(), count + 2, max(float(c.tensor.abs().max()) for c in inputs) * count
    )


@pytest.mark.parametrize("name", ["dare", "dare-ties"])
def test_dare_is_pefts_given_its_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws from the global generator; here it is handed the numbers our streams give."""
    inputs = changes((40, 50), (0.5, 0.5, 0.5), density=0.3)
    draws = iter([change.stream.uniform(change.tensor) for change in inputs])
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: (next(draws) < probabilities).float())
    plain = [change.tensor / 0.5 for change in inputs]
    function = peft.dare_linear if name == "dare" else peft.dare_ties

    expected = function(plain, torch.full((3,), 0.5), 0.3)

    assert (expected != 0).any()
    near(combine(METHODS[name], inputs), expected.double().numpy(), 5, 3 * float(expected.abs().max()))


# --- the published formulas, in float64 ---------------------------------------------------------


def trimmed(x: NDArray[np.float64], density: float) -> NDArray[np.float64]:
    keep = np.argsort(-np.abs(x).ravel(), kind="stable")[: max(1, int(density * x.size))]
    out = np.zeros(x.size)
    out[keep] = x.ravel()[keep]
    return out.reshape(x.shape)


@given(
    shape=SHAPES,
    weights=st.lists(WEIGHTS, min_size=1, max_size=5),
    density=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_ties_of_any_weights(shape: tuple[int, ...], weights: list[float], density: float, seed: int) -> None:
    """Algorithm 1 of arXiv 2306.01708 on τ = w·ΔW."""
    inputs = changes(shape, weights, seed=seed, density=density, dtype=torch.float64)
    kept = np.stack([trimmed(x, density) for x in arrays(inputs)])
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agree = np.sign(kept) == sign
    expected = (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)

    np.testing.assert_allclose(combine(METHODS["ties"], inputs).numpy(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("method", VOTING, ids=lambda method: method.name)
def test_normalize(method: Method) -> None:
    """In mergekit `normalize: true` gives the weighted mean of the agreeing ΔW, `false` the sum."""
    assert method.combine is not None
    weights = (1.0, 2.0, 0.5)
    inputs = changes((30,), weights, dtype=torch.float64)
    x = np.stack(arrays(inputs))
    agree = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
    total = (x * agree).sum(0)
    shares = (np.array(weights)[:, None] * agree).sum(0)

    for normalize, expected in (("none", total), ("count", total / agree.sum(0)), ("weight", total / shares)):
        found = method.combine(inputs, Settings(normalize=normalize))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13)


def test_sums_can_be_divided_by_the_weights() -> None:
    inputs = changes((30,), (1.0, 2.0), dtype=torch.float64)
    for name in ("dare", "magnitude-prune", "breadcrumbs"):
        method = METHODS[name]
        assert method.combine is not None
        found = method.combine(inputs, Settings(normalize="weight"))
        np.testing.assert_allclose(found.numpy(), sum(arrays(inputs)) / 3, rtol=1e-13)
    opposite = changes((30,), (1.0, -1.0), dtype=torch.float64)
    found = METHODS["dare"].combine(opposite, Settings(normalize="weight"))  # type: ignore[misc]
    np.testing.assert_allclose(found.numpy(), sum(arrays(opposite)), rtol=1e-13)


def test_signs_that_agree_give_the_mean() -> None:
    inputs = [replace(change, tensor=change.tensor.abs()) for change in changes((4, 5), (1.0, 1.0, 1.0))]

    near(combine(METHODS["ties"], inputs), np.mean(arrays(inputs), axis=0), 3, 10)


def test_elections_differ_where_one_large_change_stands_against_two() -> None:
    x = [Change(torch.tensor([3.0])), Change(torch.tensor([-1.0])), Change(torch.tensor([-1.0]))]

    assert combine(METHODS["ties"], x, Settings(consensus="total")).tolist() == [3.0]
    assert combine(METHODS["ties"], x, Settings(consensus="frequency")).tolist() == [-1.0]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share_and_the_expected_value(density: float) -> None:
    """Within five standard deviations of a binomial count, and of the mean of n rescaled ones."""
    n = 40_000
    found = combine(METHODS["dare"], [Change(torch.ones(200, 200), density=density, stream=Stream(5, 1))])

    assert set(found.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / density)}
    assert abs(int((found != 0).sum()) - n * density) < 5 * math.sqrt(n * density * (1 - density))
    assert abs(float(found.mean()) - 1) < 5 * math.sqrt((1 - density) / density / n)


def test_masks_of_two_adapters_differ() -> None:
    one, two = (
        combine(METHODS["dare"], [Change(torch.ones(1000), density=0.5, stream=Stream(5, i))]) for i in (0, 1)
    )

    assert 300 < int((one != two).sum()) < 700


def test_della_keeps_elements_by_their_rank_in_the_row() -> None:
    """Keep rates rise from density - epsilon to density + epsilon; what stays is divided by its rate."""
    rows, width, density, epsilon = 8000, 5, 0.6, 0.3
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)])
    x = (order + 1).double() * torch.where(order % 2 == 0, 1, -1)
    found = combine(METHODS["della"], [Change(x, 1.0, density, 0.0, epsilon, Stream(7, 0))])

    for rank in range(width):
        rate = density - epsilon + 2 * epsilon * rank / (width - 1)
        kept = found[order == rank]
        share = float((kept != 0).double().mean())
        assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / rows)
        np.testing.assert_allclose(kept[kept != 0].abs().numpy(), (rank + 1) / rate, rtol=1e-12)


def test_breadcrumbs_leave_out_both_ends() -> None:
    x = torch.arange(1.0, 101.0) * torch.where(torch.arange(100) % 2 == 0, 1, -1)
    found = combine(METHODS["breadcrumbs"], [Change(x, density=0.9, gamma=0.01)])
    few = combine(METHODS["breadcrumbs"], [Change(x, density=0.95, gamma=0.2)])

    assert found.nonzero().flatten().tolist() == list(range(9, 99))  # 9 smallest and the largest are gone
    assert few.nonzero().flatten().tolist() == list(range(95))  # no room for more than 5 of the largest
    assert torch.equal(found[9:99], x[9:99])


def test_equal_magnitudes_are_kept_from_the_front() -> None:
    x = torch.tensor([1.0, -2.0, 2.0, -2.0, 1.0])

    assert combine(METHODS["magnitude-prune"], [Change(x, density=0.4)]).tolist() == [0, -2, 2, 0, 0]


@given(shape=SHAPES, t=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_slerp(shape: tuple[int, ...], t: float, seed: int) -> None:
    first, second = changes(shape, (1.0, 0.5), seed=seed, dtype=torch.float64)
    a, b = arrays([first, second])
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    theta = np.arccos(cosine)
    expected = (
        (1 - t) * a + t * b
        if abs(cosine) > 0.9995
        else (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)
    )

    found = combine(METHODS["slerp"], [first, second], Settings(t=t))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(shape=SHAPES, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_slerp_ends_at_its_inputs(shape: tuple[int, ...], seed: int) -> None:
    inputs = changes(shape, (1.0, -0.5), seed=seed)

    for t, change in zip((0.0, 1.0), inputs, strict=True):
        near(combine(METHODS["slerp"], inputs, Settings(t=t)), change.tensor.double().numpy(), 2, 5)


def test_slerp_keeps_the_length_of_equally_long_vectors() -> None:
    first, second = changes((4, 5), (1.0, 1.0), dtype=torch.float64)
    second = replace(second, tensor=second.tensor / second.tensor.norm() * first.tensor.norm())

    for t in (0.2, 0.5, 0.9):
        length = combine(METHODS["slerp"], [first, second], Settings(t=t)).norm()
        assert float(length) == pytest.approx(float(first.tensor.norm()), rel=1e-12)


def test_slerp_of_collinear_and_zero_vectors_is_linear() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    for other in (2 * x, -x, torch.zeros_like(x)):
        found = combine(METHODS["slerp"], [Change(x), Change(other)], Settings(t=0.25))
        np.testing.assert_allclose(found.numpy(), (0.75 * x + 0.25 * other).numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("along", ["whole", "rows", "columns"])
def test_nuslerp_turns_rows_or_columns_by_the_strengths_share(along: str) -> None:
    first, second = changes((4, 3, 2), (1.0, 1.0), dtype=torch.float64)
    inputs = [replace(first, weight=0.6), replace(second, weight=1.4)]
    a, b = (x.reshape(4, 6) for x in arrays(inputs))
    axis = {"whole": None, "rows": 1, "columns": 0}[along]
    keep = axis is not None
    lengths = [np.sqrt((x * x).sum(axis, keepdims=keep)) for x in (a, b)]
    theta = np.arccos((a * b).sum(axis, keepdims=keep) / lengths[0] / lengths[1])
    expected = (np.sin(0.3 * theta) * a + np.sin(0.7 * theta) * b) / np.sin(theta)

    found = combine(METHODS["nuslerp"], inputs, Settings(along=along))
    np.testing.assert_allclose(found.numpy(), expected.reshape(4, 3, 2), rtol=1e-10)


def test_nuslerp_of_opposite_strengths_is_the_middle() -> None:
    first, second = changes((4, 5), (1.0, 1.0), dtype=torch.float64)
    opposite = [replace(first, weight=1.0), replace(second, weight=-1.0)]

    assert torch.equal(combine(METHODS["nuslerp"], opposite), combine(METHODS["nuslerp"], [first, second]))
