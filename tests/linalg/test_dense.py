"""Best approximations of dense matrices against numpy's SVD in float64."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.linalg import dense, subspace
from lycotool.linalg.dense import best_approximation, exact, leading, nearest_kronecker, tucker
from lycotool.linalg.low_rank import LowRank

EPS64 = np.finfo(np.float64).eps
EPS32 = float(np.finfo(np.float32).eps)

#: What float32 adds to the optimal error, as a share of the matrix's norm. Storing the two
#: factors costs at most one eps; each of the handful of products sums some hundred rounded
#: terms of either sign, which leaves about one eps more.
FLOAT32 = 16 * EPS32

seeds = st.integers(min_value=0, max_value=2**32 - 1)
sizes = st.integers(min_value=1, max_value=12)


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_spectrum(rows: int, columns: int, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A matrix with these singular values and random singular vectors."""
    count = min(rows, columns)
    return (orthonormal(rows, count, rng) * values) @ orthonormal(columns, count, rng).T


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def error_of(low: LowRank, matrix: np.ndarray) -> float:
    assert low.core is None
    return float(np.linalg.norm(matrix - numpy_of(low.up) @ numpy_of(low.down)))


def tail(values: np.ndarray, rank: int) -> float:
    """The least error of an approximation of this rank."""
    return float(np.sqrt((values[rank:] ** 2).sum()))


# --- exact ---------------------------------------------------------------------------------


def squares_tolerance(matrix: np.ndarray) -> float:
    """How far eigenvalues of the Gram matrix may be from the squares of singular values.

    The product and the symmetric eigenvalue problem are each backward stable: they move every
    eigenvalue by a small multiple of n·eps times the largest one.
    """
    return 4 * sum(matrix.shape) * EPS64 * np.linalg.norm(matrix) ** 2


@settings(deadline=None, max_examples=60)
@given(rows=sizes, columns=sizes, seed=seeds)
def test_exact_spectrum(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))

    values = exact(torch.from_numpy(matrix)).values

    assert values.dtype == torch.float64
    expected = np.linalg.svd(matrix, compute_uv=False)
    assert values.shape == expected.shape
    assert np.all(np.diff(values.numpy()) <= 0)
    # Squares agree to rounding; a value far below the largest only to the root of it.
    assert np.abs(values.numpy() ** 2 - expected**2).max() <= squares_tolerance(matrix)


@settings(deadline=None, max_examples=60)
@given(rows=sizes, columns=sizes, rank=sizes, seed=seeds)
def test_exact_truncation_is_optimal(rows: int, columns: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    tensor = torch.from_numpy(matrix)

    low = exact(tensor).truncated(rank, tensor)

    assert low.rank == min(rank, rows, columns)
    best = tail(np.linalg.svd(matrix, compute_uv=False), rank)
    # Each of the kept squares is off by no more than the tolerance, so is the error's square.
    assert error_of(low, matrix) ** 2 <= best**2 + low.rank * squares_tolerance(matrix)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (9, 9)], ids=str)
def test_up_carries_the_values_and_down_is_orthonormal(shape: tuple[int, int]) -> None:
    values = np.linspace(3, 1, min(shape))
    matrix = with_spectrum(*shape, values, np.random.default_rng(3))
    tensor = torch.from_numpy(matrix)

    low = exact(tensor).truncated(5, tensor)

    # The gaps between the values are 1/4 or more, so vectors are as good as n·eps over that.
    near = 16 * sum(shape) * EPS64 * 9
    assert np.abs(numpy_of(low.down @ low.down.T) - np.eye(5)).max() <= near
    assert np.abs(numpy_of(low.up.T @ low.up) - np.diag(values[:5] ** 2)).max() <= near


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)], ids=str)
def test_a_rank_deficient_matrix_keeps_no_direction_without_length(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    matrix = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    tensor = torch.from_numpy(matrix)

    low = exact(tensor).truncated(6, tensor)

    assert torch.isfinite(low.up).all()
    assert torch.isfinite(low.down).all()
    assert error_of(low, matrix) ** 2 <= low.rank * squares_tolerance(matrix)


# --- leading -------------------------------------------------------------------------------


def leading_of(matrix: torch.Tensor, rank: int, *, seed: int) -> tuple[LowRank, torch.Tensor]:
    """The factors and the values of one matrix."""
    found = leading(matrix[None], rank, seed=seed)
    return LowRank(found.up[0], found.down[0]), found.values[0]


#: Name to singular values, by their number and the rank asked for.
SPECTRA: dict[str, Callable[[int, int], np.ndarray]] = {
    "fast decay": lambda n, rank: 0.8 ** np.arange(n),
    "slow decay": lambda n, rank: 1 / np.sqrt(1 + np.arange(n)),
    "exactly low rank": lambda n, rank: np.where(np.arange(n) < rank, 2 - np.arange(n) / n, 0.0),
    "lower rank than asked": lambda n, rank: np.where(np.arange(n) < rank // 2 + 1, 1.0, 0.0),
    "flat tail after signal": lambda n, rank: np.where(np.arange(n) < rank // 2, 1.0, 0.3),
    "faint tail after signal": lambda n, rank: np.where(np.arange(n) < rank, 1.0, 1e-3),
    "all equal": lambda n, rank: np.ones(n),
    "repeated in groups": lambda n, rank: 2.0 ** -(np.arange(n) // 12),
    "more large ones than the rank": lambda n, rank: np.where(np.arange(n) < 2 * rank, 1.0, 1e-3),
    "one giant before a plateau": lambda n, rank: np.where(
        np.arange(n) < 1, 1000.0, np.where(np.arange(n) < rank, 1.0, 0.9)
    ),
}


def spread(n: int) -> np.ndarray:
    """Singular values like those of square Gaussian noise: dense, without a gap."""
    return 2 * np.cos(np.linspace(0, math.pi / 2, n + 1)[:-1])


def within_a_thousandth(low: LowRank, matrix: torch.Tensor, values: np.ndarray, rank: int) -> None:
    """Error ≤ 1.001 × optimal; ``values`` are those before rounding to float32."""
    best = tail(values, rank)
    norm = float(np.sqrt((values**2).sum()))
    error = error_of(low, numpy_of(matrix))
    assert error <= 1.001 * best + FLOAT32 * norm, f"{error:.6e}, optimal {best:.6e}, norm {norm:.6e}"


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from([*SPECTRA, "noise"]),
    rows=st.integers(150, 500),
    columns=st.integers(150, 500),
    rank=st.sampled_from([1, 3, 8, 24, 56, 100]),
    seed=seeds,
)
def test_leading_is_within_a_thousandth_of_optimal(
    name: str, rows: int, columns: int, rank: int, seed: int
) -> None:
    """Sizes on both sides of the switch to the filtered subspace, ranks on both sides of its limit."""
    count = min(rows, columns)
    values = spread(count) if name == "noise" else np.sort(SPECTRA[name](count, rank))[::-1]
    matrix = torch.from_numpy(with_spectrum(rows, columns, values, np.random.default_rng(seed))).float()

    low, found = leading_of(matrix, rank, seed=seed)

    within_a_thousandth(low, matrix, values, rank)
    assert low.rank == len(found) == min(rank, count)
    assert found.dtype == torch.float64
    # No subspace holds more of each direction than the best one; float32 adds its rounding.
    assert (found.numpy() <= values[:rank] + FLOAT32 * np.linalg.norm(values)).all()


#: Shapes and ranks between the sizes that are decomposed exactly.
FILTERED = [
    (shape, rank, name)
    for shape, rank, name in product(
        [(193, 193), (200, 480), (480, 200), (340, 300)],
        [1, 16],
        [*SPECTRA, "noise"],
    )
]


@pytest.mark.parametrize(("shape", "rank", "name"), FILTERED, ids=str)
def test_the_filtered_subspace_alone_is_enough(
    shape: tuple[int, int], rank: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(matrix: torch.Tensor) -> None:
        raise AssertionError("fell back")

    count = min(shape)
    values = spread(count) if name == "noise" else np.sort(SPECTRA[name](count, rank))[::-1]
    matrix = torch.from_numpy(with_spectrum(*shape, values, np.random.default_rng(rank))).float()
    monkeypatch.setattr(dense, "eigh", refuse)

    low, found = leading_of(matrix, rank, seed=0)

    within_a_thousandth(low, matrix, values, rank)
    # Values of the kept directions; the last few may mix with equals just below them.
    lost = np.linalg.norm(values[:rank]) - np.linalg.norm(found.numpy())
    assert abs(lost) <= 1e-3 * np.linalg.norm(values)


@pytest.mark.parametrize("shape", [(260, 420), (420, 260)], ids=str)
@pytest.mark.parametrize("rank", [1, 20, 70])
def test_gaussian_noise(shape: tuple[int, int], rank: int) -> None:
    """The hardest case: no gap anywhere. The optimum is numpy's."""
    matrix = torch.from_numpy(np.random.default_rng(rank).standard_normal(shape)).float()

    low = best_approximation(matrix, rank, seed=1)

    within_a_thousandth(low, matrix, np.linalg.svd(numpy_of(matrix), compute_uv=False), rank)


@pytest.mark.parametrize("shape", [(220, 300), (300, 220)], ids=str)
def test_without_convergence_it_falls_back_to_the_exact_way(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = SPECTRA["fast decay"](220, 8)
    matrix = torch.from_numpy(with_spectrum(*shape, values, np.random.default_rng(5))).float()
    monkeypatch.setattr(subspace, "_TOLERANCE", -1.0)  # no gain is ever small enough

    matrices = torch.stack([matrix, 2 * matrix])
    found = leading(matrices, 8, seed=0)
    for one, up, down, kept in zip(matrices, found.up, found.down, found.values, strict=True):
        expected = exact(one).truncated(8, one)
        # The same numbers, in another order in memory, in which products may sum them.
        assert (up - expected.up).abs().max() <= FLOAT32 * float(one.norm())
        assert (down - expected.down).abs().max() <= FLOAT32
        assert torch.equal(kept, exact(one).values[:8])


@pytest.mark.parametrize(
    "shape", [(20, 60), (20, 20), (110, 20), (220, 260), (220, 220), (310, 220)], ids=str
)
def test_many_matrices_are_as_good_as_each_alone(shape: tuple[int, int]) -> None:
    """One of each spectrum, so that they converge at different times."""
    rng = np.random.default_rng(12)
    spectra = [np.sort(make(min(shape), 8))[::-1] for make in SPECTRA.values()]
    matrices = [torch.from_numpy(with_spectrum(*shape, values, rng)).float() for values in spectra]

    found = leading(torch.stack(matrices), 8, seed=0)

    for matrix, values, up, down in zip(matrices, spectra, found.up, found.down, strict=True):
        within_a_thousandth(LowRank(up, down), matrix, values, 8)


@pytest.mark.parametrize("shape", [(192, 400), (400, 192)], ids=str)
def test_small_matrices_are_decomposed_exactly(shape: tuple[int, int]) -> None:
    matrix = torch.from_numpy(np.random.default_rng(6).standard_normal(shape)).float()

    low = best_approximation(matrix, 4, seed=0)

    expected = exact(matrix).truncated(4, matrix)
    assert torch.equal(low.up, expected.up)
    assert torch.equal(low.down, expected.down)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (200, 300), (300, 200)], ids=str)
def test_a_zero_matrix_has_zero_factors(shape: tuple[int, int]) -> None:
    low, values = leading_of(torch.zeros(shape), 3, seed=0)

    assert values.tolist() == [0, 0, 0]
    assert low.shape == shape
    assert torch.equal(low.dense(), torch.zeros(shape))
    assert torch.isfinite(low.up).all()
    assert torch.isfinite(low.down).all()


def test_equal_seeds_give_equal_bits() -> None:
    values = SPECTRA["slow decay"](240, 8)
    matrix = torch.from_numpy(with_spectrum(240, 300, values, np.random.default_rng(7))).float()

    first, again, other = (best_approximation(matrix, 8, seed=seed) for seed in (4, 4, 5))

    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    assert not torch.equal(first.up, other.up)
    within_a_thousandth(other, matrix, values, 8)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    best_approximation(torch.ones(200, 300), 2, seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 30), (240, 300), (300, 240)], ids=str)
def test_factors_keep_the_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(8)
    matrix = torch.from_numpy(rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1])))

    low = best_approximation(matrix.to(dtype), 3, seed=0)

    assert low.up.dtype == low.down.dtype == dtype


# --- nearest Kronecker product -------------------------------------------------------------


def rearranged(matrix: np.ndarray, a: int, c: int) -> np.ndarray:
    """Block ``(i, j)`` of an a x c partition as row ``i·c + j``, written out block by block."""
    b, d = matrix.shape[0] // a, matrix.shape[1] // c
    return np.stack(
        [matrix[i * b : (i + 1) * b, j * d : (j + 1) * d].ravel() for i, j in product(range(a), range(c))]
    )


factor_sizes = st.tuples(*[st.integers(1, 5)] * 4)


@settings(deadline=None, max_examples=60)
@given(shape=factor_sizes, seed=seeds)
def test_a_kronecker_product_is_recovered(shape: tuple[int, int, int, int], seed: int) -> None:
    a, b, c, d = shape
    rng = np.random.default_rng(seed)
    matrix = np.kron(rng.standard_normal((a, c)), rng.standard_normal((b, d)))

    w1, w2 = nearest_kronecker(torch.from_numpy(matrix), (a, c))

    assert w1.shape == (a, c)
    assert w2.shape == (b, d)
    # The leading pair of a rank-1 matrix has no rival, so it is exact to n·eps.
    allowed = 8 * sum(shape) ** 2 * EPS64 * np.linalg.norm(matrix)
    assert np.linalg.norm(np.kron(w1.numpy(), w2.numpy()) - matrix) <= allowed
    assert abs(float(w1.norm() - w2.norm())) <= 8 * sum(shape) ** 2 * EPS64 * float(w1.norm())


@settings(deadline=None, max_examples=60)
@given(shape=factor_sizes, seed=seeds)
def test_no_kronecker_product_is_nearer(shape: tuple[int, int, int, int], seed: int) -> None:
    a, b, c, d = shape
    matrix = np.random.default_rng(seed).standard_normal((a * b, c * d))

    w1, w2 = nearest_kronecker(torch.from_numpy(matrix), (a, c))

    values = np.linalg.svd(rearranged(matrix, a, c), compute_uv=False)
    found = np.linalg.norm(np.kron(w1.numpy(), w2.numpy()) - matrix)
    # As for exact truncation: the square of the error is good to n·eps of the squared norm.
    assert found**2 <= tail(values, 1) ** 2 + 8 * matrix.size * EPS64 * np.linalg.norm(matrix) ** 2


def test_the_kernel_of_a_convolution_belongs_to_the_second_factor() -> None:
    rng = np.random.default_rng(9)
    w1, w2 = rng.standard_normal((2, 3)), rng.standard_normal((4, 5, 3, 3))
    weight = np.einsum("ac, bdxy -> abcdxy", w1, w2).reshape(8, 15, 3, 3)

    first, second = nearest_kronecker(torch.from_numpy(weight).flatten(1), (2, 3))

    scale = float(first[0, 0]) / w1[0, 0]
    assert np.allclose(first, scale * w1, rtol=1e-12, atol=1e-12)  # 1e4 eps: far above rounding
    assert np.allclose(second.reshape(w2.shape), w2 / scale, rtol=1e-12, atol=1e-12)


def test_the_nearest_kronecker_product_of_zero_is_zero() -> None:
    w1, w2 = nearest_kronecker(torch.zeros(6, 20), (2, 4))

    assert torch.equal(w1, torch.zeros(2, 4))
    assert torch.equal(w2, torch.zeros(3, 5))


# --- Tucker form ---------------------------------------------------------------------------


def tucker_dense(up: torch.Tensor, core: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    return np.einsum("pq..., op, qi -> oi...", core.numpy(), up.numpy(), down.numpy())


def random_tucker(shape: tuple[int, ...], rank: int, rng: np.random.Generator) -> np.ndarray:
    """A tensor whose two channel unfoldings have the given rank."""
    core = rng.standard_normal((rank, rank, *shape[2:]))
    up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    return np.einsum("pq..., op, qi -> oi...", core, up, down)


def unfolding_values(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of the output and the input unfolding."""
    by_output = tensor.reshape(tensor.shape[0], -1)
    by_input = np.moveaxis(tensor, 1, 0).reshape(tensor.shape[1], -1)
    one, two = (np.linalg.svd(unfolding, compute_uv=False) for unfolding in (by_output, by_input))
    return one, two


SHAPES = [(12, 10, 3, 3), (10, 12, 3), (4, 30, 3, 3), (40, 3, 2, 2), (6, 7, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_tucker_is_exact_for_tensors_of_that_rank(shape: tuple[int, ...], rank: int) -> None:
    tensor = random_tucker(shape, rank, np.random.default_rng(rank))

    up, core, down = tucker(torch.from_numpy(tensor), rank, seed=0)

    assert core.shape == (rank, rank, *shape[2:])
    # The subspaces come from Gram matrices: their squares are exact to n·eps, so the part of
    # the tensor they miss is of the order of the root.
    allowed = math.sqrt(4 * tensor.size * EPS64) * np.linalg.norm(tensor)
    assert np.linalg.norm(tucker_dense(up, core, down) - tensor) <= allowed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5, 50])
def test_the_core_is_the_projection_on_orthonormal_factors(shape: tuple[int, ...], rank: int) -> None:
    tensor = np.random.default_rng(rank).standard_normal(shape)

    up, core, down = tucker(torch.from_numpy(tensor), rank, seed=0)

    kept = min(rank, *shape[:2])
    assert up.shape == (shape[0], kept)
    assert down.shape == (kept, shape[1])
    near = 64 * tensor.size * EPS64  # sums over one axis, of numbers of order 1
    assert np.abs(numpy_of(up.T @ up) - np.eye(kept)).max() <= near
    assert np.abs(numpy_of(down @ down.T) - np.eye(kept)).max() <= near
    expected = np.einsum("oi..., op, qi -> pq...", tensor, up.numpy(), down.numpy())
    assert np.abs(core.numpy() - expected).max() <= near * np.abs(tensor).max()


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from(SHAPES), rank=st.integers(1, 8), decay=st.floats(0.3, 1), seed=seeds)
def test_tucker_is_nearly_as_good_as_any_alternative(
    shape: tuple[int, ...], rank: int, decay: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    wide = min(shape[:2])
    tensor = random_tucker(shape, wide, rng)
    # Channels of falling weight, as in trained layers.
    tensor = tensor * decay ** np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))

    up, core, down = tucker(torch.from_numpy(tensor), rank, seed=0)
    error = float(np.linalg.norm(tucker_dense(up, core, down) - tensor))

    rank = min(rank, wide)
    tails = [tail(values, rank) for values in unfolding_values(tensor)]
    slack = math.sqrt(4 * tensor.size * EPS64) * np.linalg.norm(tensor)  # as above
    # No tensor of this rank is nearer than either unfolding allows, and HOSVD's error is at
    # most both together (De Lathauwer, De Moor, Vandewalle 2000), so within √2 of any other.
    assert max(tails) - slack <= error <= math.hypot(*tails) + slack
    assert error <= math.sqrt(2) * one_after_the_other(tensor, rank) + slack


@pytest.mark.parametrize("shape", [(24, 20, 3, 3), (12, 30, 3, 3), (40, 10, 3)], ids=str)
@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_tucker_of_signal_and_noise_loses_nothing_to_its_alternative(
    shape: tuple[int, ...], noise: float, rank: int
) -> None:
    """A change of rank 4 under flat noise, which is what fine-tuning leaves."""
    rng = np.random.default_rng(rank)
    signal, flat = random_tucker(shape, 4, rng), rng.standard_normal(shape)
    tensor = signal + noise * np.linalg.norm(signal) / np.linalg.norm(flat) * flat

    up, core, down = tucker(torch.from_numpy(tensor), rank, seed=0)

    error = np.linalg.norm(tucker_dense(up, core, down) - tensor)
    assert error <= 1.05 * one_after_the_other(tensor, rank)


def one_after_the_other(tensor: np.ndarray, rank: int) -> float:
    """The error of LyCORIS' way: an SVD by output channel, then one of what it left by input."""
    by_output = tensor.reshape(tensor.shape[0], -1)
    left = np.linalg.svd(by_output, full_matrices=False)[0][:, :rank]
    kept = np.einsum("oi..., op -> pi...", tensor, left)
    by_input = np.moveaxis(kept, 1, 0).reshape(tensor.shape[1], -1)
    right = np.linalg.svd(by_input, full_matrices=False)[0][:, :rank]
    rebuilt = np.einsum("pi..., op, iq, jq -> oj...", kept, left, right, right)
    return float(np.linalg.norm(rebuilt - tensor))


def test_tucker_of_a_large_layer_uses_the_leading_directions() -> None:
    """Channels above the switch: both bases come from Krylov spaces."""
    rng = np.random.default_rng(10)
    tensor = torch.from_numpy(random_tucker((240, 220, 3, 3), 6, rng)).float()
    noise = torch.from_numpy(rng.standard_normal(tensor.shape)).float()
    tensor += 0.01 * tensor.norm() / noise.norm() * noise

    up, core, down = tucker(tensor, 6, seed=0)

    found = torch.einsum("pqxy, op, qi -> oixy", core, up, down)
    # At most 1 % is noise, and a projection leaves no more than all of it.
    assert float((found - tensor).norm()) <= 0.0101 * float(tensor.norm())
