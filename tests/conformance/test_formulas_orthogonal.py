"""Diag-OFT, BOFT and (IA)³ against dense matrices, built in numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conformance.rounding import assert_equal_up_to_rounding
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lycotool.algorithms.base import DEFAULT_READING, Bound, MismatchError
from lycotool.algorithms.detection import detect, weight_change

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]

fifty = settings(deadline=None, max_examples=50)
kernels = st.sampled_from([(), (1, 1), (3,), (2, 3)])
alphas = st.sampled_from([None, 0.0, 0.01, 0.05, 100.0])
seeds = st.integers(min_value=0, max_value=2**32 - 1)


def evaluate(arrays: Arrays, base: np.ndarray, alpha: float | None = None) -> np.ndarray:
    """``W'`` of a file with these tensors."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    header = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    detected = detect(header | ({} if alpha is None else {"alpha": ()}))
    dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, DEFAULT_READING)
    bound = Bound(tensors, detected.layout, detected.sizes, dims)
    weight = torch.from_numpy(base)
    return base + weight_change(detected, bound, tuple(base.shape), weight, strength=1.0).numpy()


def rotations(blocks: np.ndarray, alpha: float | None, rows: int) -> np.ndarray:
    """``(I + Q)(I - Q)⁻¹``, ``Q`` bounded over all blocks together."""
    q = blocks - np.swapaxes(blocks, -1, -2)
    norm = np.sqrt((q**2).sum())
    if alpha and norm > alpha * rows:
        q = q * (alpha * rows / norm)
    identity = np.eye(q.shape[-1])
    return (identity + q) @ np.linalg.inv(identity - q)


def rescale_of(seed: int, rows: int, kernel: Shape, wanted: bool) -> Arrays:
    values = np.random.default_rng(seed + 1).uniform(0.5, 1.5, (rows, *[1] * (1 + len(kernel))))
    return {"rescale": values} if wanted else {}


def check(actual: np.ndarray, expected: np.ndarray, blocks: np.ndarray) -> None:
    """Solving with ``I - Q`` magnifies rounding by its condition, at most ``1 + ‖Q‖``."""
    q = blocks - np.swapaxes(blocks, -1, -2)
    condition = 1 + float(np.linalg.norm(q))
    largest = float(np.abs(expected).max()) * condition
    assert_equal_up_to_rounding(torch.from_numpy(actual), torch.from_numpy(expected), largest=largest)


@fifty
@given(
    n=st.integers(1, 4), b=st.integers(1, 5), i=st.integers(1, 4), kernel=kernels, alpha=alphas,
    seed=seeds, rescaled=st.booleans(),
)  # fmt: skip
def test_diag_oft(
    n: int, b: int, i: int, kernel: Shape, alpha: float | None, seed: int, rescaled: bool
) -> None:
    generator = np.random.default_rng(seed)
    blocks = generator.standard_normal((n, b, b))
    base = generator.standard_normal((n * b, i, *kernel))
    stored = {"oft_blocks": blocks} | rescale_of(seed, n * b, kernel, rescaled)

    dense = scipy.linalg.block_diag(*rotations(blocks, alpha, n * b))
    rotated = (dense.T @ base.reshape(n * b, -1)).reshape(base.shape)

    check(evaluate(stored, base, alpha), stored.get("rescale", 1.0) * rotated, blocks)


@fifty
@given(n=st.integers(1, 4), b=st.integers(1, 5), i=st.integers(1, 4), alpha=alphas, seed=seeds)
def test_diag_oft_keeps_the_norms_of_its_blocks(
    n: int, b: int, i: int, alpha: float | None, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    blocks = generator.standard_normal((n, b, b))
    base = generator.standard_normal((n * b, i))

    changed = evaluate({"oft_blocks": blocks}, base, alpha)

    check(
        np.linalg.norm(changed.reshape(n, b, i), axis=1),
        np.linalg.norm(base.reshape(n, b, i), axis=1),
        blocks,
    )


@fifty
@given(
    n=st.integers(1, 4),
    b=st.integers(1, 5),
    i=st.integers(1, 4),
    kernel=kernels,
    seed=seeds,
    rescaled=st.booleans(),
)
def test_the_old_form_stores_the_rotation_itself(
    n: int, b: int, i: int, kernel: Shape, seed: int, rescaled: bool
) -> None:
    generator = np.random.default_rng(seed)
    stored_rotations = generator.standard_normal((n, b, b))
    base = generator.standard_normal((n * b, i, *kernel))
    stored = {"oft_diag": stored_rotations} | rescale_of(seed, n * b, kernel, rescaled)

    dense = scipy.linalg.block_diag(*stored_rotations)
    rotated = (dense.T @ base.reshape(n * b, -1)).reshape(base.shape)

    check(evaluate(stored, base), stored.get("rescale", 1.0) * rotated, stored_rotations)


def test_alpha_bounds_the_rotation_it_does_not_scale_it() -> None:
    generator = np.random.default_rng(1)
    blocks, base = generator.standard_normal((2, 3, 3)), generator.standard_normal((6, 4))
    norm = float(np.linalg.norm(blocks - np.swapaxes(blocks, 1, 2)))

    loose = evaluate({"oft_blocks": blocks}, base, alpha=1.01 * norm / 6)
    tight = evaluate({"oft_blocks": blocks}, base, alpha=0.5 * norm / 6)

    assert np.array_equal(loose, evaluate({"oft_blocks": blocks}, base))
    # Half the skew matrix is what half the blocks give.
    check(tight, evaluate({"oft_blocks": blocks / 2}, base), blocks)


# --- BOFT ----------------------------------------------------------------------------------


def butterfly_permutation(rows: int, block: int, stage: int) -> np.ndarray:
    """The matrix that brings partners ``2^stage · block / 2`` rows apart into one block.

    Rows are counted in groups of two runs of ``k``; the permutation interleaves the runs.
    """
    k = 2**stage * block // 2
    matrix = np.zeros((rows, rows))
    for row in range(rows):
        group, inside = divmod(row, 2 * k)
        run, position = divmod(inside, k)
        matrix[group * 2 * k + 2 * position + run, row] = 1
    return matrix


@fifty
@given(
    half=st.integers(1, 3), stages=st.integers(1, 3), multiple=st.integers(1, 2), i=st.integers(1, 3),
    kernel=kernels, alpha=alphas, seed=seeds, rescaled=st.booleans(),
)  # fmt: skip
def test_boft(
    half: int,
    stages: int,
    multiple: int,
    i: int,
    kernel: Shape,
    alpha: float | None,
    seed: int,
    rescaled: bool,
) -> None:
    block = 2 * half
    rows = multiple * 2**stages * half
    assume(rows % block == 0)
    generator = np.random.default_rng(seed)
    blocks = generator.standard_normal((stages, rows // block, block, block))
    base = generator.standard_normal((rows, i, *kernel))
    stored = {"oft_blocks": blocks} | rescale_of(seed, rows, kernel, rescaled)

    dense = np.eye(rows)
    for stage, turns in enumerate(rotations(blocks, alpha, rows)):
        order = butterfly_permutation(rows, block, stage)
        dense = order.T @ scipy.linalg.block_diag(*turns) @ order @ dense
    rotated = (dense @ base.reshape(rows, -1)).reshape(base.shape)

    check(evaluate(stored, base, alpha), stored.get("rescale", 1.0) * rotated, blocks)


@fifty
@given(stages=st.integers(1, 3), i=st.integers(1, 4), alpha=alphas, seed=seeds)
def test_boft_keeps_every_columns_norm(stages: int, i: int, alpha: float | None, seed: int) -> None:
    generator = np.random.default_rng(seed)
    blocks = generator.standard_normal((stages, 4, 4, 4))
    base = generator.standard_normal((16, i))

    changed = evaluate({"oft_blocks": blocks}, base, alpha)

    check(np.linalg.norm(changed, axis=0), np.linalg.norm(base, axis=0), blocks)


@pytest.mark.parametrize(("stages", "blocks", "block"), [(1, 2, 3), (3, 3, 4), (4, 4, 4)])
def test_stages_that_do_not_divide_the_rows_are_refused(stages: int, blocks: int, block: int) -> None:
    with pytest.raises(MismatchError, match="butterfly stages"):
        detect({"oft_blocks": (stages, blocks, block, block)})


# --- (IA)³ ---------------------------------------------------------------------------------


@fifty
@given(o=st.integers(1, 5), i=st.integers(1, 5), kernel=kernels, seed=seeds, axis=st.sampled_from([0, 1]))
def test_ia3(o: int, i: int, kernel: Shape, seed: int, axis: int) -> None:
    generator = np.random.default_rng(seed)
    base = generator.standard_normal((o, i, *kernel))
    vector = generator.standard_normal((o, i)[axis])
    stored = vector.reshape(1, -1, *[1] * len(kernel)) if kernel else vector

    expected = base.copy()
    for index, value in enumerate(vector):
        place = (index,) if axis == 0 else (slice(None), index)
        expected[place] *= 1 + value

    actual = evaluate({"weight": stored, "on_input": np.array(axis)}, base)
    # One product and two sums apart.
    assert np.allclose(actual, expected, rtol=4 * np.finfo(float).eps, atol=4 * np.finfo(float).eps * 4)


def test_ia3_of_another_width_is_refused() -> None:
    with pytest.raises(MismatchError, match="7 elements"):
        evaluate({"weight": np.zeros(7), "on_input": np.array(0)}, np.zeros((5, 7)))
