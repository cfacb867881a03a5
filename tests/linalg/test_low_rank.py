"""Low-rank algebra against numpy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.linalg.low_rank import LowRank, concat, khatri_rao_rows, kron, low_rank_split

sizes = st.integers(min_value=1, max_value=6)
ranks = st.integers(min_value=1, max_value=8)
kernels = st.sampled_from([(1,), (3,), (1, 1), (2, 3), (3, 3), (2, 1, 2)])
seeds = st.integers(min_value=0, max_value=2**32 - 1)
fifty = settings(deadline=None, max_examples=50)

#: No element here takes more than 8·8·12 products and sums; each rounds by eps/2 of at most
#: the product of the operands' norms.
OPERATIONS = 2 * 8 * 8 * 12


@st.composite
def low_ranks(draw: st.DrawFn, *, core: bool | None = None, size: tuple[int, int] | None = None) -> LowRank:
    """Random factors, with or without a core."""
    out, columns = size or (draw(sizes), draw(sizes))
    rank, rank_in = draw(ranks), draw(ranks)
    generator = torch.Generator().manual_seed(draw(seeds))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if core is None:
        core = draw(st.booleans())
    if not core:
        return LowRank(normal(out, rank), normal(rank, columns))
    kernel = draw(kernels) if size is None else (2, 2)
    return LowRank(normal(out, rank), normal(rank_in, columns), normal(rank, rank_in, *kernel))


def dense(low: LowRank) -> np.ndarray:
    """``ΔW`` element by element as the class defines it, flattened."""
    up, down = low.up.numpy(), low.down.numpy()
    if low.core is None:
        return up @ down
    core = low.core.numpy().reshape(low.rank, down.shape[0], -1)
    result = np.zeros((up.shape[0], down.shape[1], core.shape[2]))
    for p in range(core.shape[0]):
        for q in range(core.shape[1]):
            result += up[:, p, None, None] * down[q][None, :, None] * core[p, q]
    return result.reshape(up.shape[0], -1)


def assert_close(actual: torch.Tensor, expected: np.ndarray, *operands: torch.Tensor) -> None:
    assert tuple(actual.shape) == expected.shape
    largest = math.prod(max(1.0, float(operand.norm())) for operand in operands)
    allowed = OPERATIONS * np.finfo(np.float64).eps * largest
    assert np.abs(actual.numpy() - expected).max(initial=0) <= allowed


def parts(low: LowRank) -> list[torch.Tensor]:
    return [part for part in (low.up, low.down, low.core) if part is not None]


@fifty
@given(low=low_ranks())
def test_dense_is_the_defining_sum(low: LowRank) -> None:
    assert_close(low.dense(), dense(low), *parts(low))
    assert low.shape == tuple(low.dense().shape)
    assert low.rank == low.up.shape[1]


@fifty
@given(low=low_ranks())
def test_folding_removes_the_core_and_nothing_else(low: LowRank) -> None:
    folded = low.folded()

    assert folded.core is None
    assert folded.rank == low.rank
    assert folded.shape == low.shape
    assert_close(folded.dense(), dense(low), *parts(low))


@fifty
@given(low=low_ranks(), factor=st.sampled_from([-2.0, -1.0, 0.0, 0.25, 3.0]))
def test_scaling_multiplies_the_change(low: LowRank, factor: float) -> None:
    scaled = low.scaled(factor)

    assert_close(scaled.dense(), factor * dense(low), *parts(scaled))
    assert torch.equal(scaled.down, low.down)
    assert scaled.core is low.core


@fifty
@given(low=low_ranks())
def test_the_norm_is_that_of_the_dense_matrix(low: LowRank) -> None:
    expected = float(np.linalg.norm(dense(low)))
    # The square is a sum that cancels up to the product of the factors' norms squared.
    factors = [low.up, low.folded().down]
    largest = math.prod(float(factor.norm()) for factor in factors) ** 2
    assert abs(float(low.norm()) ** 2 - expected**2) <= OPERATIONS * np.finfo(np.float64).eps * largest


@fifty
@given(low=low_ranks())
def test_capping_keeps_the_change_at_a_possible_rank(low: LowRank) -> None:
    capped = low.capped()

    assert capped.rank <= min(capped.shape)
    assert capped.rank <= low.rank
    assert_close(capped.dense(), dense(low), *parts(low))


@fifty
@given(low=low_ranks())
def test_capping_leaves_a_small_rank_alone(low: LowRank) -> None:
    if low.rank <= min(low.shape):
        assert low.capped() is low
    else:
        assert low.capped().core is None


@fifty
@given(data=st.data(), out=sizes, columns=sizes, count=st.integers(1, 4))
def test_concat_is_the_sum(data: st.DataObject, out: int, columns: int, count: int) -> None:
    core = data.draw(st.booleans())
    lows = [data.draw(low_ranks(core=core, size=(out, columns))) for _ in range(count)]

    total = concat(lows)

    everything = [part for low in lows for part in parts(low)]
    assert_close(total.dense(), sum(dense(low) for low in lows), *everything)
    assert total.rank == sum(low.rank for low in lows)
    assert (total.core is not None) == core


@fifty
@given(data=st.data(), out=sizes, columns=sizes)
def test_concat_of_cores_and_plain_factors_is_the_sum_without_a_core(
    data: st.DataObject, out: int, columns: int
) -> None:
    first = data.draw(low_ranks(core=True, size=(out, columns)))
    second = data.draw(low_ranks(core=False, size=(out, columns * 4)))  # a kernel of 2 x 2

    total = concat([first, second])

    assert total.core is None
    assert_close(total.dense(), dense(first) + dense(second), *parts(first), *parts(second))


def test_the_joint_core_is_block_diagonal() -> None:
    first = LowRank(torch.ones(1, 2), torch.ones(1, 1), torch.full((2, 1, 3), 5.0))
    second = LowRank(torch.ones(1, 1), torch.ones(2, 1), torch.full((1, 2, 3), 7.0))

    core = concat([first, second]).core

    assert core is not None
    assert core[..., 0].tolist() == [[5, 0, 0], [5, 0, 0], [0, 7, 7]]
    assert core.shape == (3, 3, 3)


@fifty
@given(n=sizes, p=ranks, q=ranks, seed=seeds)
def test_khatri_rao_rows_are_kronecker_products(n: int, p: int, q: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((n, p)), generator.standard_normal((n, q))

    product = khatri_rao_rows(torch.from_numpy(left), torch.from_numpy(right))

    expected = np.stack([np.kron(a, b) for a, b in zip(left, right, strict=True)])
    assert np.array_equal(product.numpy(), expected)  # one product each, so no rounding differs


@fifty
@given(a=sizes, b=sizes, c=sizes, d=sizes, seed=seeds, transposed=st.booleans())
def test_kron_is_numpys(a: int, b: int, c: int, d: int, seed: int, transposed: bool) -> None:
    """Transposed inputs of one row too, on which torch.kron fails."""
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((a, b)), generator.standard_normal((c, d))
    if transposed:
        left, right = left.T, right.T

    product = kron(torch.from_numpy(left), torch.from_numpy(right))

    assert np.array_equal(product.numpy(), np.kron(left, right))  # one product each


@fifty
@given(n=sizes, m=sizes, r=ranks, s=ranks, seed=seeds)
def test_khatri_rao_makes_a_hadamard_product_low_rank(n: int, m: int, r: int, s: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, r), (r, m), (n, s), (s, m))
    )

    product = khatri_rao_rows(a, c) @ khatri_rao_rows(b.T, d.T).T

    assert_close(product, (a @ b).numpy() * (c @ d).numpy(), a, b, c, d)


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3), (1, 1)], ids=str)
def test_a_split_is_exact_on_the_smaller_side(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    left, right = low_rank_split(matrix)

    assert left.shape[1] == right.shape[0] == min(shape)
    assert torch.equal(left @ right, matrix)
    assert left.dtype == right.dtype == matrix.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_stays_in_the_dtype_it_is_given(dtype: torch.dtype) -> None:
    low = LowRank(
        torch.ones(2, 5, dtype=dtype), torch.ones(5, 3, dtype=dtype), torch.ones(5, 5, 1, dtype=dtype)
    )

    results = [low.folded(), low.scaled(0.5), low.capped(), concat([low, low])]

    assert {part.dtype for result in results for part in parts(result)} == {dtype}
    assert low.dense().dtype == dtype
    assert {half.dtype for half in low_rank_split(low.up)} == {dtype}
