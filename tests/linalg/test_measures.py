"""Ranks and likenesses from factors, against numpy's SVD of the dense matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from examples import many
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.linalg.low_rank import LowRank
from lycotool.linalg.measures import (
    as_factors,
    effective_rank,
    energy_rank,
    likeness,
    singular_values,
    stable_rank,
)

#: Squares in float64 know values down to 1e-8 of the largest.
TOLERANCE = 1e-7


def factors(rows: int, columns: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(up.double(), down.double())


def svd(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix.numpy(), full_matrices=False)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 99),
)
def test_singular_values_are_those_of_the_matrix(shapes: list, dense: bool, seed: int) -> None:
    low = [factors(*shape, seed=seed) for shape in shapes]
    found = singular_values([one.dense() for one in low] if dense else low)
    for one, values in zip(low, found, strict=True):
        expected = svd(one.dense())[1]
        assert len(values) == (len(expected) if dense else min(one.rank, len(expected)))
        padded = np.zeros_like(expected)
        padded[: len(values)] = values.numpy()
        assert padded == pytest.approx(expected, abs=TOLERANCE * expected[0])


def test_a_core_is_folded() -> None:
    low = LowRank(torch.randn(6, 2).double(), torch.randn(3, 5).double(), torch.randn(2, 3, 3, 3).double())
    (values,) = singular_values([low])
    assert values.tolist() == pytest.approx(svd(low.dense())[1][:2].tolist(), rel=TOLERANCE)


def test_an_empty_matrix_has_none() -> None:
    assert singular_values([torch.zeros(3, 0)])[0].shape == (0,)


def test_ranks_by_their_definitions() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0]).double()
    assert stable_rank(values) == pytest.approx(14 / 9)
    shares = [3 / 6, 2 / 6, 1 / 6]
    assert effective_rank(values) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert [energy_rank(values, share) for share in (9 / 14, 0.65, 13 / 14, 0.93)] == [1, 2, 2, 3]


@many
@given(st.integers(1, 20))
def test_equal_values_have_every_rank_their_number(count: int) -> None:
    values = torch.full((count,), 0.25).double()
    assert stable_rank(values) == pytest.approx(count)
    assert effective_rank(values) == pytest.approx(count)
    assert energy_rank(values, 1.0) == count


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(3)])
def test_zero_has_rank_zero(values: torch.Tensor) -> None:
    assert (stable_rank(values), effective_rank(values), energy_rank(values, 0.9)) == (0.0, 0.0, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.5, 1),
    st.integers(0, 99),
)
def test_likeness_is_that_of_the_dense_matrices(
    rows: int, columns: int, r1: int, r2: int, energy: float, seed: int
) -> None:
    a, b = factors(rows, columns, r1, seed), factors(rows, columns, r2, seed + 1000)
    found = likeness(as_factors(a), as_factors(b.dense()), energy=energy)

    x, y = a.dense(), b.dense()
    assert found.inner == pytest.approx(float((x * y).sum()), abs=1e-9)
    assert found.norms == pytest.approx([float(x.norm()), float(y.norm())])
    assert found.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-9)
    (u1, s1, v1), (u2, s2, v2) = svd(x), svd(y)
    i, j = (energy_rank(torch.tensor(s), energy) for s in (s1, s2))
    left = np.square(u1[:, :i].T @ u2[:, :j]).sum() / min(i, j)
    right = np.square(v1[:i] @ v2[:j].T).sum() / min(i, j)
    # Directions of nearly equal values turn by the rounding over their distance.
    gaps = [s[k - 1] - s[k] if k < len(s) else s[k - 1] for s, k in ((s1, i), (s2, j))]
    if all(gap > 1e-4 * s[0] for gap, s in zip(gaps, (s1, s2), strict=True)):
        assert found.overlap_out == pytest.approx(left, abs=1e-6)
        assert found.overlap_in == pytest.approx(right, abs=1e-6)


def test_a_matrix_is_wholly_like_itself_and_its_negative_overlaps_it() -> None:
    a = factors(7, 8, 3, 0)
    same, negative = likeness(a, a), likeness(a, a.scaled(-2.0))
    assert (same.cosine, same.overlap_out, same.overlap_in) == pytest.approx((1, 1, 1))
    assert (negative.cosine, negative.overlap_out, negative.overlap_in) == pytest.approx((-1, 1, 1))


def test_zero_is_like_nothing() -> None:
    a = factors(4, 5, 2, 0)
    found = likeness(a, a.scaled(0.0))
    assert (found.cosine, found.overlap_out, found.overlap_in, found.inner) == (None, None, None, 0.0)
