"""LoKr's split of a dimension against LyCORIS' own function.

The table in that function's docstring is wrong for 360 (it says 8 x 45, the function returns
18 x 20), so the function is what counts: it made the files.
"""

import math

import pytest
from lycoris.functional.general import factorization as lycoris_factorization

from lycotool.linalg.factorization import factorization

DIMENSIONS = range(1, 2049)
FACTORS = (-1, *range(1, 17), 32)


@pytest.mark.parametrize("factor", FACTORS)
def test_equals_lycoris(factor: int) -> None:
    found = {dimension: factorization(dimension, factor) for dimension in DIMENSIONS}
    assert found == {dimension: lycoris_factorization(dimension, factor) for dimension in DIMENSIONS}


@pytest.mark.parametrize("factor", FACTORS)
def test_splits_into_a_smaller_and_a_larger_part(factor: int) -> None:
    for dimension in DIMENSIONS:
        m, n = factorization(dimension, factor)
        assert m * n == dimension
        assert 1 <= m <= n


def test_no_bound_gives_the_most_equal_split() -> None:
    for dimension in DIMENSIONS:
        divisors = (d for d in range(math.isqrt(dimension), 0, -1) if dimension % d == 0)
        assert factorization(dimension)[0] == next(divisors)


def test_the_row_in_which_lycoris_documents_something_else() -> None:
    assert factorization(360, -1) == lycoris_factorization(360, -1) == (18, 20)


@pytest.mark.parametrize("factor", [-2, -100])
def test_every_negative_factor_means_no_bound(factor: int) -> None:
    assert factorization(360, factor) == lycoris_factorization(360, factor) == (18, 20)
