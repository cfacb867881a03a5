"""Spectra from factors against a full SVD of the dense product, in float64.

Where the tolerances come from. The method decomposes Gram matrices, so it knows the
*squares* of the singular values, and those up to the rounding of the Grams and of two small
products of them. An inner product of ``n`` terms is off by at most ``n eps`` times the product
of the norms, so with ``P = ‖up‖ ‖down‖`` (Frobenius) every computed square is within
``(out + columns + 8 r) eps P²`` of the true one: :func:`square_noise` is twice that, the other
half being the reference's own rounding. A value near zero is then off by up to the square
root of it, about 2e-7 P for the sizes here; a value near P by 1e-14 P. ``P`` and not the
largest value is the scale because a product can be far smaller than its factors.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.linalg.low_rank import LowRank, low_rank_split
from lycotool.linalg.spectra import FactorSpectrum, KroneckerSpectrum, grams, spectra, spectrum_of_kronecker

EPS = float(np.finfo(np.float64).eps)
EPS32 = float(np.finfo(np.float32).eps)

often = settings(deadline=None, max_examples=60)
sometimes = settings(deadline=None, max_examples=30)

sizes = st.integers(1, 14)
ranks = st.integers(1, 10)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def factors(draw: st.DrawFn) -> LowRank:
    """``up @ down`` of any shape, graded, deficient, with repeated or empty columns."""
    rows, columns, rank = draw(sizes), draw(sizes), draw(ranks)
    generator = torch.Generator().manual_seed(draw(seeds))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    true_rank = draw(st.integers(1, rank))
    up = normal(rows, true_rank) @ normal(true_rank, rank) if true_rank < rank else normal(rows, rank)
    down = normal(rank, columns)
    decades = draw(st.sampled_from([0, 0, 1, 4, 9]))
    grading = torch.logspace(0, -decades, rank, dtype=torch.float64)
    up = up * grading
    if draw(st.booleans()):  # the other way round: the product is smaller than its factors
        down = down * grading.flip(0)[:, None]
    for _ in range(draw(st.integers(0, 2))):
        source, target = draw(st.integers(0, rank - 1)), draw(st.integers(0, rank - 1))
        up[:, target] = up[:, source]
    if draw(st.booleans()):
        up[:, draw(st.integers(0, rank - 1))] = 0
    return LowRank(up * draw(st.sampled_from([1.0, 1e-6, 1e5])), down)


def spectrum_of(low: LowRank) -> FactorSpectrum:
    return spectra([grams(low)])[0]


def size_of(low: LowRank) -> float:
    """``P = ‖up‖ ‖down‖``."""
    return float(low.up.double().norm() * low.down.double().norm())


def square_noise(low: LowRank) -> float:
    """How far a computed square may be from the true one; see above."""
    return 2 * (sum(low.shape) + 8 * low.rank) * EPS * size_of(low) ** 2


def dense_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


def discarded(values: torch.Tensor, rank: int) -> float:
    """The error of the best approximation of a rank (Eckart-Young)."""
    return math.sqrt(float(values[rank:].square().sum()))


def error_of(low: LowRank, dense: torch.Tensor) -> float:
    return float((low.up.double() @ low.down.double() - dense.double()).norm())


def assert_spectrum(values: torch.Tensor, low: LowRank) -> None:
    expected = dense_values(low.dense())[: len(values)]
    assert len(values) == min(low.rank, *low.shape)
    assert values.dtype == torch.float64
    assert bool((values >= 0).all())
    assert bool((values[:-1] >= values[1:]).all())
    noise = square_noise(low)
    assert float((values.square() - expected.square()).abs().max()) <= noise
    assert float((values - expected).abs().max()) <= math.sqrt(noise)


@often
@given(low=factors())
def test_values_are_those_of_the_dense_product(low: LowRank) -> None:
    assert_spectrum(spectrum_of(low).values, low)


@often
@given(low=factors())
def test_a_truncation_of_any_rank_is_the_best_one(low: LowRank) -> None:
    spectrum, dense = spectrum_of(low), low.dense()
    expected = dense_values(dense)
    for rank in range(1, len(spectrum.values) + 1):
        kept = spectrum.truncated(rank, low)
        assert kept.up.shape == (low.shape[0], rank)
        assert kept.down.shape == (rank, low.shape[1])
        best, found = discarded(expected, rank), error_of(kept, dense)
        # No matrix of that rank can be nearer; both numbers carry a dense product's rounding.
        assert found >= best - (sum(low.shape) + low.rank) * EPS * size_of(low)
        # Directions below the noise of the squares may be lost, and no more than those.
        assert found <= best + math.sqrt(2 * square_noise(low))


@often
@given(low=factors())
def test_the_factors_are_singular_vectors(low: LowRank) -> None:
    """``down`` has orthonormal rows, and column ``j`` of ``up`` has norm ``σ_j``."""
    spectrum = spectrum_of(low)
    values, noise = spectrum.values, square_noise(low)
    clear = int((values.square() > 100 * noise).sum())
    if clear == 0:
        return
    kept = spectrum.truncated(clear, low)
    # Each vector is divided by its value, and so is its share of the noise.
    allowed = noise / (values[:clear, None] * values[None, :clear])
    off = kept.down @ kept.down.T - torch.eye(clear, dtype=torch.float64)
    assert bool((off.abs() <= allowed).all())
    assert bool(((kept.up.norm(dim=0) - values[:clear]).abs() <= noise / values[:clear]).all())


def test_directions_of_rounding_do_no_harm() -> None:
    """Deficient factors: what is noise in the Grams may be left out, never blown up.

    Dividing by a value that is noise gives a vector of any length. Seldom enough to escape
    hypothesis, often enough to hit a file of several hundred modules, so many are tried.
    """
    generator = torch.Generator().manual_seed(0)
    lows = []
    for index in range(4000):
        left, right = torch.randn(12, 3, generator=generator), torch.randn(3, 6, generator=generator)
        up, down = left @ right, torch.randn(6, 10, generator=generator)
        low = LowRank(up.double(), down.double())  # rank 3 up to float32's rounding
        if index % 2:
            low = LowRank(left.double() @ right.double(), down.double())  # up to float64's
        lows.append(low)
    worst = 0.0
    for low, spectrum in zip(lows, spectra([grams(low) for low in lows]), strict=True):
        kept = spectrum.truncated(len(spectrum.values), low)
        worst = max(worst, error_of(kept, low.dense()) / math.sqrt(2 * square_noise(low)))
    assert worst <= 1


@sometimes
@given(low=factors(), seed=seeds)
def test_float32_factors_lose_nothing_but_their_own_rounding(low: LowRank, seed: int) -> None:
    single = LowRank(low.up.float(), low.down.float())
    spectrum = spectrum_of(single)
    exact = LowRank(single.up.double(), single.down.double())
    assert_spectrum(spectrum.values, exact)
    for rank in range(1, len(spectrum.values) + 1):
        kept = spectrum.truncated(rank, single)
        assert kept.up.dtype == kept.down.dtype == torch.float32
        # Two products over the rank in float32, each with operands whose norms multiply to P
        # (the mixing matrices carry the inverse of what they are multiplied with).
        rounding = 4 * low.rank * math.sqrt(low.rank) * EPS32 * size_of(exact)
        best = discarded(dense_values(exact.dense()), rank)
        assert error_of(kept, exact.dense()) <= best + math.sqrt(2 * square_noise(exact)) + rounding


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 7, 3), (1, 1, 1), (3, 2, 8)])
def test_zero_has_a_zero_spectrum(rows: int, columns: int, rank: int) -> None:
    low = LowRank(torch.zeros(rows, rank), torch.randn(rank, columns))
    spectrum = spectrum_of(low)
    assert spectrum.values.tolist() == [0.0] * min(rows, columns, rank)
    kept = spectrum.truncated(1, low)
    assert not kept.dense().any()
    assert bool(torch.isfinite(kept.down).all())


def test_rank_above_both_sides_is_capped() -> None:
    low = LowRank(torch.randn(4, 9).double(), torch.randn(9, 6).double())
    spectrum = spectrum_of(low)
    assert len(spectrum.values) == 4
    assert error_of(spectrum.truncated(4, low), low.dense()) <= math.sqrt(2 * square_noise(low))


def test_a_repeated_column_adds_no_rank() -> None:
    up = torch.randn(8, 3).double()
    low = LowRank(torch.cat([up, up], dim=1), torch.randn(6, 9).double())
    values = spectrum_of(low).values
    assert float(values[3:].max()) <= math.sqrt(square_noise(low))
    assert error_of(spectrum_of(low).truncated(3, low), low.dense()) <= math.sqrt(2 * square_noise(low))


def test_a_product_far_below_its_factors() -> None:
    """``[u, u + 1e-3 w] @ [v; -v]``: the leading parts cancel."""
    u, w, v = torch.randn(9, 1).double(), torch.randn(9, 1).double(), torch.randn(1, 7).double()
    low = LowRank(torch.cat([u, u + 1e-3 * w], dim=1), torch.cat([v, -v]))
    assert_spectrum(spectrum_of(low).values, low)
    # The one value is 1e-3 P: its square is known to noise / 1e-6 P², so it is right to 1e-8.
    expected = float((1e-3 * w @ v).norm())
    assert abs(float(spectrum_of(low).values[0]) - expected) <= square_noise(low) / expected


@sometimes
@given(lows=st.lists(factors(), min_size=1, max_size=6))
def test_a_batch_gives_what_each_gives_alone(lows: list[LowRank]) -> None:
    together = spectra([grams(low) for low in lows])
    assert len(together) == len(lows)
    for low, found in zip(lows, together, strict=True):
        alone = spectrum_of(low)
        assert len(found.values) == len(alone.values)
        noise = square_noise(low)
        assert float((found.values.square() - alone.values.square()).abs().max()) <= noise
        middle = (len(found.values) + 1) // 2
        errors = [error_of(s.truncated(middle, low), low.dense()) for s in (found, alone)]
        assert abs(errors[0] - errors[1]) <= math.sqrt(2 * noise)


@sometimes
@given(lows=st.lists(factors(), min_size=1, max_size=4))
def test_the_same_factors_give_the_same_bits(lows: list[LowRank]) -> None:
    one, two = (spectra([grams(low) for low in lows]) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first.values, second.values)
        assert torch.equal(first.mix_up, second.mix_up)
        assert torch.equal(first.mix_down, second.mix_down)


@sometimes
@given(low=factors())
def test_signs_are_fixed(low: LowRank) -> None:
    """The largest entry of each direction is positive, whatever the eigensolver returned."""
    columns = spectrum_of(low).mix_down
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    assert bool((largest >= 0).all())


@sometimes
@given(
    low=factors(),
    rank_in=st.integers(1, 5),
    width=st.integers(1, 5),
    kernel=st.sampled_from([(3,), (1, 1), (3, 3), (2, 1, 2)]),
)
def test_a_core_is_folded_exactly(low: LowRank, rank_in: int, width: int, kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(low.rank)
    core = torch.randn(low.rank, rank_in, *kernel, generator=generator, dtype=torch.float64)
    down = torch.randn(rank_in, width, generator=generator, dtype=torch.float64)
    cp = LowRank(low.up, down, core)
    # Σ_pq up[o,p] core[p,q,k] down[q,i], written out.
    dense = torch.einsum("op, pqk, qi -> oik", low.up, core.flatten(2), down).flatten(1)
    folded = cp.folded()
    spectrum = spectrum_of(folded)
    expected, noise = dense_values(dense), square_noise(folded)
    count = len(spectrum.values)
    assert float((spectrum.values.square() - expected[:count].square()).abs().max()) <= noise
    for rank in {1, (count + 1) // 2, count}:
        found = error_of(spectrum.truncated(rank, folded), dense)
        assert found <= discarded(expected, rank) + math.sqrt(2 * noise)


# --- Kronecker products --------------------------------------------------------------------


@st.composite
def parts(draw: st.DrawFn) -> LowRank:
    """One side of a Kronecker product: factored, or whole and split with an identity."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(seeds))
    if draw(st.booleans()):
        whole = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return LowRank(*low_rank_split(whole))
    rank = draw(st.integers(1, 6))
    return LowRank(
        torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, columns, generator=generator, dtype=torch.float64),
    )


def kronecker_noise(first: LowRank, second: LowRank) -> float:
    """A product of values has the noise of one times the size of the other, both ways."""
    return 2 * (
        math.sqrt(square_noise(first)) * size_of(second) + math.sqrt(square_noise(second)) * size_of(first)
    )


def assert_kronecker(spectrum: KroneckerSpectrum, first: LowRank, second: LowRank) -> None:
    dense = torch.kron(first.dense().contiguous(), second.dense().contiguous())
    expected, noise = dense_values(dense), kronecker_noise(first, second)
    count = len(spectrum.values)
    assert count == min(first.rank, *first.shape) * min(second.rank, *second.shape)
    assert bool((spectrum.values[:-1] >= spectrum.values[1:]).all())
    assert float((spectrum.values - expected[:count]).abs().max()) <= noise
    assert float(expected[count:].sum()) <= noise  # nothing is missing
    for rank in range(1, count + 1):
        kept = spectrum.truncated(rank)
        assert kept.up.shape == (dense.shape[0], rank)
        assert kept.down.shape == (rank, dense.shape[1])
        best, found = discarded(expected, rank), error_of(kept, dense)
        assert best - noise <= found <= best + noise


@often
@given(first=parts(), second=parts())
def test_a_kronecker_product_from_its_parts(first: LowRank, second: LowRank) -> None:
    assert_kronecker(spectrum_of_kronecker(first, second), first, second)


def test_a_kronecker_product_of_wholes() -> None:
    first = LowRank(*low_rank_split(torch.randn(4, 2).double()))
    second = LowRank(*low_rank_split(torch.randn(3, 5).double()))
    spectrum = spectrum_of_kronecker(first, second)
    assert len(spectrum.values) == 2 * 3
    assert_kronecker(spectrum, first, second)


def test_a_kronecker_product_with_a_folded_core() -> None:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    first = LowRank(*low_rank_split(normal(2, 3)))
    second = LowRank(normal(4, 2), normal(3, 5), normal(2, 3, 3, 3)).folded()
    assert_kronecker(spectrum_of_kronecker(first, second), first, second)


def test_a_kronecker_product_with_zero() -> None:
    spectrum = spectrum_of_kronecker(
        LowRank(*low_rank_split(torch.zeros(2, 2))), LowRank(*low_rank_split(torch.randn(3, 3)))
    )
    assert spectrum.values.tolist() == [0.0] * 6
    assert not spectrum.truncated(1).dense().any()


def test_kronecker_spectra_are_repeatable() -> None:
    first = LowRank(*low_rank_split(torch.randn(3, 3)))
    second = LowRank(torch.randn(5, 2), torch.randn(2, 4))
    one, two = (spectrum_of_kronecker(first, second) for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.truncated(3).dense(), two.truncated(3).dense())
