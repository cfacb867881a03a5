"""Cayley rotations and butterfly orders against numpy in float64."""

import numpy as np
import pytest
import torch
from examples import many
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lycotool.linalg.rotations import (
    butterfly_blocks,
    cayley_minus_identity,
    from_butterfly,
    rotate_blocks,
    rotate_runs,
    rotate_stage,
    to_butterfly,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(min_value=0, max_value=2**32 - 1)
fifty = settings(deadline=None, max_examples=50)


def skew(blocks: np.ndarray) -> np.ndarray:
    return blocks - np.swapaxes(blocks, -1, -2)


def rounding(blocks: np.ndarray) -> float:
    """Solving with ``I - Q`` of size b: some 10·b² roundings times its condition, 1 + ‖Q‖."""
    return 10 * blocks.shape[-1] ** 2 * EPS * (1 + float(np.linalg.norm(skew(blocks))))


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(shape)


@many
@given(n=st.integers(1, 4), b=st.integers(1, 6), seed=seeds, scale=st.sampled_from([1e-8, 1e-2, 1.0, 30.0]))
def test_the_result_is_a_rotation(n: int, b: int, seed: int, scale: float) -> None:
    blocks = normal(seed, n, b, b, scale=scale)

    rotation = cayley_minus_identity(torch.from_numpy(blocks), 0.0).numpy() + np.eye(b)

    products = np.swapaxes(rotation, -1, -2) @ rotation
    assert np.abs(products - np.eye(b)).max() <= rounding(blocks)
    assert np.allclose(np.linalg.det(rotation), 1, rtol=0, atol=b * rounding(blocks))


@many
@given(n=st.integers(1, 4), b=st.integers(1, 6), seed=seeds)
def test_the_result_is_cayleys(n: int, b: int, seed: int) -> None:
    blocks = normal(seed, n, b, b)
    q, identity = skew(blocks), np.eye(b)

    actual = cayley_minus_identity(torch.from_numpy(blocks), 0.0).numpy()

    expected = (identity + q) @ np.linalg.inv(identity - q) - identity
    assert np.abs(actual - expected).max() <= rounding(blocks)


@many
@given(lead=st.sampled_from([(), (3,), (2, 3)]), b=st.integers(1, 4), seed=seeds)
def test_leading_axes_are_a_batch(lead: tuple[int, ...], b: int, seed: int) -> None:
    blocks = normal(seed, *lead, b, b)

    batch = cayley_minus_identity(torch.from_numpy(blocks), 0.0)

    assert batch.shape == (*lead, b, b)
    for index in np.ndindex(*lead):
        single = cayley_minus_identity(torch.from_numpy(blocks[index]), 0.0)
        assert np.abs(batch[index].numpy() - single.numpy()).max() <= rounding(blocks)


@many
@given(n=st.integers(1, 4), b=st.integers(2, 5), seed=seeds, share=st.sampled_from([0.01, 0.5, 0.999]))
def test_a_bound_shrinks_all_blocks_together(n: int, b: int, seed: int, share: float) -> None:
    blocks = normal(seed, n, b, b)
    norm = float(np.linalg.norm(skew(blocks)))

    bounded = cayley_minus_identity(torch.from_numpy(blocks), share * norm)

    free = cayley_minus_identity(torch.from_numpy(share * blocks), 0.0)
    assert np.abs((bounded - free).numpy()).max() <= rounding(blocks)


@fifty
@given(n=st.integers(1, 4), b=st.integers(1, 5), seed=seeds, bound=st.sampled_from([0.0, -1.0, 1e6]))
def test_a_loose_bound_changes_nothing(n: int, b: int, seed: int, bound: float) -> None:
    blocks = torch.from_numpy(normal(seed, n, b, b))

    assert torch.equal(cayley_minus_identity(blocks, bound), cayley_minus_identity(blocks, 0.0))


def test_small_rotations_keep_their_digits() -> None:
    """``R`` in float32 would lose everything below 6e-8; ``R - I`` has it."""
    blocks = torch.tensor([[[0.0, 1e-9], [0.0, 0.0]]])

    change = cayley_minus_identity(blocks, 0.0)

    # 2 Q (I - Q)⁻¹ = 2 Q up to the square of 1e-9, far below one rounding.
    expected = torch.tensor([[[0.0, 2e-9], [-2e-9, 0.0]]])
    assert change.dtype == torch.float32
    assert torch.allclose(change, expected, rtol=torch.finfo(torch.float32).eps, atol=1e-17)


def test_zero_is_the_identity() -> None:
    assert not cayley_minus_identity(torch.zeros(3, 4, 4), 0.0).any()


# --- applying them -------------------------------------------------------------------------


@many
@given(n=st.integers(1, 5), b=st.integers(1, 5), columns=st.integers(1, 5), seed=seeds)
def test_rotating_is_a_block_diagonal_product(n: int, b: int, columns: int, seed: int) -> None:
    blocks, rows = normal(seed, n, b, b), normal(seed + 1, n * b, columns)

    actual = rotate_blocks(torch.from_numpy(blocks), torch.from_numpy(rows)).numpy()

    expected = np.concatenate([block @ part for block, part in zip(blocks, np.split(rows, n), strict=True)])
    # One sum of b products.
    assert np.abs(actual - expected).max() <= b * EPS * np.linalg.norm(blocks) * np.linalg.norm(rows)


def butterfly_order(rows: int, block: int, stage: int) -> torch.Tensor:
    """Which row stands where."""
    return to_butterfly(torch.arange(rows)[:, None], block, stage).flatten()


@many
@given(half=st.integers(1, 4), stage=st.integers(0, 3), groups=st.integers(1, 3))
def test_the_butterfly_pairs_rows_that_far_apart(half: int, stage: int, groups: int) -> None:
    distance = 2**stage * half
    rows = groups * 2 * distance
    assume(rows <= 96)

    order = butterfly_order(rows, 2 * half, stage).tolist()

    assert sorted(order) == list(range(rows))
    pairs = zip(order[::2], order[1::2], strict=True)
    assert all(second - first == distance for first, second in pairs)
    back = from_butterfly(torch.tensor(order)[:, None], 2 * half, stage)
    assert torch.equal(back.flatten(), torch.arange(rows))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, [0, 2, 1, 3, 4, 6, 5, 7]),
        (1, [0, 4, 1, 5, 2, 6, 3, 7]),
    ],
)
def test_the_order_for_eight_rows_in_blocks_of_four(stage: int, expected: list[int]) -> None:
    assert butterfly_order(8, 4, stage).tolist() == expected


def test_blocks_of_two_need_no_reordering_at_first() -> None:
    assert butterfly_order(6, 2, 0).tolist() == list(range(6))


@many
@given(
    half=st.integers(1, 3), stages=st.integers(1, 5), multiple=st.integers(1, 3), share=st.integers(0, 4),
    seed=seeds,
)  # fmt: skip
def test_stages_at_once(half: int, stages: int, multiple: int, share: int, seed: int) -> None:
    """In float64; each of at most five stages rounds sums of at most 96 products of numbers of order one."""
    rows = multiple * 2**stages * half
    first = share % stages
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(stages, rows // (2 * half), 2 * half, 2 * half, generator=generator).double()
    turns = cayley_minus_identity(made, 0.0)
    x = torch.randn(rows, 3, generator=generator).double()
    stepped = x
    for stage in range(first, stages):
        stepped = stepped + rotate_stage(turns[stage], stepped, stage)

    blocks = butterfly_blocks(turns[first:], first)
    assert blocks.shape == (multiple, 2**first, *[2 ** (stages - first) * half] * 2)
    at_once = x + rotate_runs(blocks, x, half if first else blocks.shape[-1])

    torch.testing.assert_close(at_once, stepped, rtol=0, atol=1e-12)


def test_a_small_turn_keeps_its_digits() -> None:
    """``R - I`` is made without ``R``: in float32 turns of 1e-6 keep six digits of it."""
    made = 1e-6 * torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    rough = butterfly_blocks(cayley_minus_identity(made, 0.0), 0).double()
    exact = butterfly_blocks(cayley_minus_identity(made.double(), 0.0), 0)
    assert float((rough - exact).norm() / exact.norm()) < 1e-6
