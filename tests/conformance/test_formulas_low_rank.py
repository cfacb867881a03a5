"""LoRA, LoHa, LoKr and GLoRA against their formulas, written out in numpy."""

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from conformance.rounding import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.algorithms.base import DEFAULT_READING, Bound, MismatchError, Reading
from lycotool.algorithms.detection import Detected, bias_change, detect, weight_change

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]

fifty = settings(deadline=None, max_examples=50)
sizes = st.integers(min_value=1, max_value=6)
ranks = st.integers(min_value=1, max_value=4)
kernels = st.sampled_from([(), (1,), (3,), (1, 1), (2, 3), (3, 3), (2, 1, 2)])
cp_kernels = st.sampled_from([(1,), (3,), (1, 1), (2, 3), (3, 3), (2, 1, 2)])
alphas = st.sampled_from([None, 1.0, 0.5, 3.0, -2.0])
seeds = st.integers(min_value=0, max_value=2**32 - 1)


def normal(seed: int, **shapes: Shape) -> Arrays:
    """One array of normal values per shape; a double underscore stands for a dot."""
    generator = np.random.default_rng(seed)
    return {name.replace("__", "."): generator.standard_normal(shape) for name, shape in shapes.items()}


def read(arrays: Arrays, alpha: float | None, reading: Reading = DEFAULT_READING) -> tuple[Bound, Detected]:
    """What a command makes of a file with these tensors."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    header = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    detected = detect(header | ({} if alpha is None else {"alpha": ()}))
    dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, reading)
    return Bound(tensors, detected.layout, detected.sizes, dims, reading), detected


def evaluate(
    arrays: Arrays,
    shape: Shape,
    alpha: float | None = None,
    base: np.ndarray | None = None,
    reading: Reading = DEFAULT_READING,
) -> torch.Tensor:
    """The weight's change of a file with these tensors."""
    bound, detected = read(arrays, alpha, reading)
    weight = None if base is None else torch.from_numpy(base)
    return weight_change(detected, bound, shape, weight, strength=1.0)


def scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def check(actual: torch.Tensor, expected: np.ndarray, *operands: np.ndarray) -> None:
    """Equal but for rounding; products of the operands may cancel, their norms bound that."""
    largest = math.prod(max(1.0, float(np.linalg.norm(operand))) for operand in operands)
    assert_equal_up_to_rounding(actual, torch.from_numpy(np.asarray(expected)), largest=largest, operations=8)


# --- LoRA ----------------------------------------------------------------------------------


@fifty
@given(o=sizes, i=sizes, r=ranks, kernel=kernels, alpha=alphas, seed=seeds)
def test_lora(o: int, i: int, r: int, kernel: Shape, alpha: float | None, seed: int) -> None:
    ones = (1,) * len(kernel)
    t = normal(seed, lora_up__weight=(o, r, *ones), lora_down__weight=(r, i, *kernel))
    up, down = t["lora_up.weight"].reshape(o, r), t["lora_down.weight"]

    expected = scale(alpha, r) * np.tensordot(up, down, axes=1)

    check(evaluate(t, (o, i, *kernel), alpha), expected, up, down)


@fifty
@given(o=sizes, i=sizes, p=ranks, q=ranks, kernel=cp_kernels, alpha=alphas, seed=seeds)
def test_lora_with_a_core(
    o: int, i: int, p: int, q: int, kernel: Shape, alpha: float | None, seed: int
) -> None:
    """Core axis 0 belongs to the output, axis 1 to the input; the rank is the input's."""
    ones = (1,) * len(kernel)
    t = normal(
        seed,
        lora_up__weight=(o, p, *ones),
        lora_mid__weight=(p, q, *kernel),
        lora_down__weight=(q, i, *ones),
    )
    up, mid, down = (
        t["lora_up.weight"].reshape(o, p),
        t["lora_mid.weight"],
        t["lora_down.weight"].reshape(q, i),
    )

    expected = np.zeros((o, i, *kernel))
    for a in range(p):
        for b in range(q):
            outer = np.outer(up[:, a], down[b])
            expected += outer.reshape(o, i, *ones) * mid[a, b]

    check(evaluate(t, (o, i, *kernel), alpha), scale(alpha, q) * expected, up, mid, down)


@fifty
@given(o=sizes, i=sizes, r=ranks, kernel=kernels, alpha=alphas, seed=seeds, data=st.data())
def test_lora_with_a_sparse_remainder(
    o: int, i: int, r: int, kernel: Shape, alpha: float | None, seed: int, data: st.DataObject
) -> None:
    """Duplicate coordinates add up, as in every coordinate format."""
    columns = i * math.prod(kernel)
    places = st.tuples(st.integers(0, o - 1), st.integers(0, columns - 1))
    where = np.array(data.draw(st.lists(places, min_size=1, max_size=12)), dtype=np.int16).T
    ones = (1,) * len(kernel)
    t = normal(
        seed,
        lora_up__weight=(o, r, *ones),
        lora_down__weight=(r, i, *kernel),
        bias_values=(where.shape[1],),
    )
    up, down = t["lora_up.weight"].reshape(o, r), t["lora_down.weight"].reshape(r, columns)
    remainder = scipy.sparse.coo_matrix((t["bias_values"], where), shape=(o, columns)).toarray()

    expected = scale(alpha, r) * (up @ down + remainder)

    stored = t | {"bias_indices": where, "bias_size": np.array([o, columns], dtype=np.int16)}
    shape = (o, i, *kernel)
    check(evaluate(stored, shape, alpha), expected.reshape(shape), up, down, t["bias_values"])


def test_sparse_coordinates_above_32767_have_wrapped() -> None:
    """LyCORIS stores them as int16, which turns 40000 into -25536."""
    columns = 40_001
    arrays = {
        "lora_up.weight": np.zeros((2, 1)),
        "lora_down.weight": np.zeros((1, columns)),
        "bias_indices": np.array([[1], [40_000]]).astype(np.int16),
        "bias_values": np.array([0.25]),
        "bias_size": np.array([2, columns]).astype(np.int16),
    }
    assert arrays["bias_indices"].min() < 0

    change = evaluate(arrays, (2, columns))

    assert change[1, 40_000] == 0.25
    assert change.count_nonzero() == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias_indices": np.array([[2], [0]])}, "outside"),
        ({"bias_indices": np.array([[0], [3]])}, "outside"),
        ({"bias_indices": np.array([[-1], [0]])}, "outside"),
        ({"bias_size": np.array([3, 2])}, "bias_size"),
    ],
)
def test_a_sparse_remainder_that_does_not_fit_is_refused(changed: Arrays, message: str) -> None:
    arrays = {
        "lora_up.weight": np.zeros((2, 1)),
        "lora_down.weight": np.zeros((1, 3)),
        "bias_indices": np.array([[0], [0]]),
        "bias_values": np.array([1.0]),
        "bias_size": np.array([2, 3]),
    }
    assert evaluate(arrays, (2, 3))[0, 0] == 1

    with pytest.raises(MismatchError, match=message):
        evaluate(arrays | changed, (2, 3))


def test_the_bias_of_lora() -> None:
    """``diff_b`` is a difference, ``lora_B.bias`` is part of what alpha scales."""
    t = normal(5, lora_up__weight=(4, 2), lora_down__weight=(2, 3), lora_up__bias=(4,), diff_b=(4,))
    bound, detected = read(t, 3.0)

    change = bias_change(detected, bound, strength=-2.0)

    assert change is not None
    check(change, -2.0 * (1.5 * t["lora_up.bias"] + t["diff_b"]), t["diff_b"])


# --- LoHa ----------------------------------------------------------------------------------


@fifty
@given(o=sizes, i=sizes, r1=ranks, r2=ranks, kernel=kernels, alpha=alphas, seed=seeds)
def test_loha(o: int, i: int, r1: int, r2: int, kernel: Shape, alpha: float | None, seed: int) -> None:
    columns = i * math.prod(kernel)
    t = normal(seed, hada_w1_a=(o, r1), hada_w1_b=(r1, columns), hada_w2_a=(o, r2), hada_w2_b=(r2, columns))

    product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])

    shape = (o, i, *kernel)
    check(evaluate(t, shape, alpha), (scale(alpha, r1) * product).reshape(shape), *t.values())


@fifty
@given(
    o=sizes, i=sizes, r1=ranks, r2=ranks, kernel=cp_kernels, alpha=alphas, seed=seeds, shared=st.booleans()
)
def test_loha_with_cores(
    o: int, i: int, r1: int, r2: int, kernel: Shape, alpha: float | None, seed: int, shared: bool
) -> None:
    """Files of LyCORIS before 2.0 used the first core twice, which takes equal ranks."""
    r2 = r1 if shared else r2
    t = normal(
        seed,
        hada_t1=(r1, r1, *kernel), hada_w1_a=(r1, o), hada_w1_b=(r1, i),
        hada_t2=(r2, r2, *kernel), hada_w2_a=(r2, o), hada_w2_b=(r2, i),
    )  # fmt: skip

    def half(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.tensordot(np.tensordot(a.T, core, axes=1), b, axes=(1, 0)), -1, 1)

    second_core = t["hada_t1"] if shared else t["hada_t2"]
    product = half(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"]) * half(
        second_core, t["hada_w2_a"], t["hada_w2_b"]
    )

    reading = Reading(loha_cp_shared_core=shared)
    actual = evaluate(t, (o, i, *kernel), alpha, reading=reading)
    check(actual, scale(alpha, r1) * product, *t.values(), second_core)


# --- LoKr ----------------------------------------------------------------------------------


@fifty
@given(
    a=sizes, b=sizes, c=sizes, d=sizes, r1=ranks, r2=ranks, q=ranks,
    kernel=kernels, first=st.sampled_from(["full", "product"]),
    second=st.sampled_from(["full", "product", "flat product", "cp"]), alpha=alphas, seed=seeds,
)  # fmt: skip
def test_lokr(
    a: int, b: int, c: int, d: int, r1: int, r2: int, q: int,
    kernel: Shape, first: str, second: str, alpha: float | None, seed: int,
) -> None:  # fmt: skip
    """``ΔW[(a, b), (c, d), k] = w1[a, c] · w2[b, d, k]``."""
    if second == "cp" and not kernel:
        kernel = (3, 3)
    flat = d * math.prod(kernel)
    shapes: dict[str, Shape] = (
        {"lokr_w1": (a, c)} if first == "full" else {"lokr_w1_a": (a, r1), "lokr_w1_b": (r1, c)}
    )
    shapes |= {
        "full": {"lokr_w2": (b, d, *kernel)},
        "product": {"lokr_w2_a": (b, r2), "lokr_w2_b": (r2, d, *kernel)},
        "flat product": {"lokr_w2_a": (b, r2), "lokr_w2_b": (r2, flat)},
        "cp": {"lokr_t2": (q, r2, *kernel), "lokr_w2_a": (q, b), "lokr_w2_b": (r2, d)},
    }[second]
    t = normal(seed, **shapes)

    w1 = t["lokr_w1"] if first == "full" else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if second == "full":
        w2 = t["lokr_w2"].reshape(b, flat)
    elif second == "cp":
        w2 = np.einsum("pqk, pb, qd -> bdk", t["lokr_t2"].reshape(q, r2, -1), t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"].reshape(r2, flat)
    product = np.einsum("ac, bdk -> abcdk", w1, w2.reshape(b, d, -1)).reshape(a * b, c * d, *kernel)

    c_scale = 1.0
    if second != "full" or first != "full":
        c_scale = scale(alpha, r2 if second != "full" else r1)
    shape = (a * b, c * d, *kernel)
    check(evaluate(t, shape, alpha), c_scale * product, *t.values())


# --- GLoRA ---------------------------------------------------------------------------------


@fifty
@given(
    o=sizes, i=st.integers(min_value=3, max_value=6), r=st.integers(min_value=1, max_value=2),
    kernel=kernels, alpha=alphas, seed=seeds, layout=st.sampled_from(["new", "old", "old, once"]),
)  # fmt: skip
def test_glora(o: int, i: int, r: int, kernel: Shape, alpha: float | None, seed: int, layout: str) -> None:
    ones = (1,) * len(kernel)
    t = normal(
        seed, left_a=(i, r), right_a=(r, i), left_b=(o, r), right_b=(r, i, *kernel), base=(o, i, *kernel)
    )
    base = t.pop("base")

    prompted = np.einsum("oik, ij -> ojk", base.reshape(o, i, -1), t["left_a"] @ t["right_a"])
    added = np.tensordot(t["left_b"], t["right_b"], axes=1)
    power = 2 if layout == "old" else 1
    expected = scale(alpha, r) ** power * (prompted.reshape(base.shape) + added)

    names = (
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
        if layout == "new"
        else ("a2.weight", "a1.weight", "b2.weight", "b1.weight")
    )
    stored = dict(zip(names, t.values(), strict=True))
    stored = {n: x if x.ndim > 2 else x.reshape(*x.shape, *ones) for n, x in stored.items()}
    reading = Reading(glora_old_scale="once") if layout == "old, once" else DEFAULT_READING
    check(evaluate(stored, base.shape, alpha, base, reading), expected, base, *t.values())


# --- T-LoRA --------------------------------------------------------------------------------


@fifty
@given(o=sizes, i=sizes, r=ranks, alpha=alphas, seed=seeds)
def test_tlora(o: int, i: int, r: int, alpha: float | None, seed: int) -> None:
    """Relative to the principal components of the base, where training started."""
    t = normal(seed, p_layer__weight=(o, r), lambda_layer=(1, r), q_layer__weight=(r, i), base=(o, i))
    base = t.pop("base")

    values, vectors = np.linalg.eigh(base.T @ base)
    top = vectors[:, np.argsort(values)[::-1][:r]]
    trained = t["p_layer.weight"] @ np.diag(t["lambda_layer"][0]) @ t["q_layer.weight"]
    expected = scale(alpha, r) * (trained - base @ top @ top.T)

    actual = evaluate(t, (o, i), alpha, base)
    # The projector on the top r directions is as uncertain as eps over the gap that separates
    # them; examples with a gap below 1e-3 of the largest value tell nothing.
    ordered = np.append(np.sort(values)[::-1], 0)
    gap = ordered[r - 1] - ordered[r] if r < len(values) else ordered[0]
    if gap > 1e-3 * ordered[0]:
        check(actual, expected, *t.values(), base * ordered[0] / gap)
