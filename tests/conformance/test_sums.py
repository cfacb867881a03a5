"""What can be said and done without the base: factors, scaling and sums."""

import pytest
import torch
from conformance.rounding import assert_equal_up_to_rounding
from conformance.samples import Case, Module, cases, make

from lycotool.algorithms import lora
from lycotool.algorithms.base import DEFAULT_READING, Bound
from lycotool.algorithms.detection import Detected, bias_change, detect, weight_change
from lycotool.linalg.low_rank import LowRank, concat

CASES = [case for case in cases() if case.dora_axis is None]
WITH_FACTORS = [
    case for case in CASES if case.algorithm.factors is not None and case.layout.name != "plain + sparse"
]
WITH_CONCAT = [case for case in CASES if case.algorithm.concat is not None]


def change(module: Module) -> torch.Tensor:
    return weight_change(module.detected, module.bound(), module.shape, module.base, strength=1.0)


def factors(module: Module) -> LowRank:
    make_factors = module.case.algorithm.factors
    assert make_factors is not None
    found = make_factors(module.bound())
    assert found is not None
    return found


def parts_of(case: Case, count: int) -> list[Module]:
    """Modules of ranks 2, 1, 1 (where there are ranks), on layers of one shape."""
    return [make(case, rank_shift=-1 if i else 0, seed=i) for i in range(count)]


WEIGHTS = pytest.mark.parametrize("weights", [(0.75, -1.25), (-0.5, 1.0, 0.3)], ids=str)


# --- factors -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_FACTORS, ids=str)
def test_the_factors_multiply_to_the_change(case: Case) -> None:
    module = make(case)
    found = factors(module)

    assert_equal_up_to_rounding(found.dense().reshape(module.shape), change(module))
    assert found.shape == (
        case.layout.rows(module.sizes),
        case.layout.columns(module.sizes),
    )


@pytest.mark.parametrize("case", WITH_FACTORS, ids=str)
def test_the_rank_of_the_factors(case: Case) -> None:
    module = make(case)
    size = module.header.__getitem__
    name = case.algorithm.name
    if name == "loha":
        expected = size("hada_w1_b")[0] * size("hada_w2_b")[0]
    elif name == "lokr":
        first = size("lokr_w1_b")[0] if "lokr_w1_b" in module.tensors else min(size("lokr_w1"))
        if "lokr_t2" in module.tensors:
            second = size("lokr_w2_a")[0]
        elif "lokr_w2_a" in module.tensors:
            second = size("lokr_w2_a")[1]
        else:
            second = min(module.tensors["lokr_w2"].flatten(1).shape)
        expected = first * second
    else:
        expected = size("lora_up.weight")[1]

    assert factors(module).rank == expected


@pytest.mark.parametrize("case", WITH_FACTORS, ids=str)
def test_a_core_stays_where_there_is_one(case: Case) -> None:
    assert (factors(make(case)).core is not None) == case.layout.use_conv_cp


def test_a_sparse_part_has_no_factors() -> None:
    for case in CASES:
        if case.layout.name == "plain + sparse":
            assert case.algorithm.factors is not None
            assert case.algorithm.factors(make(case).bound()) is None


def test_factors_never_need_the_base() -> None:
    assert not [case for case in WITH_FACTORS if case.algorithm.needs_base]


@pytest.mark.parametrize("case", WITH_FACTORS, ids=str)
@WEIGHTS
def test_joined_factors_are_the_sum(case: Case, weights: tuple[float, ...]) -> None:
    modules = parts_of(case, len(weights))
    expected = sum(
        (w * change(m) for w, m in zip(weights, modules, strict=True)), torch.zeros(modules[0].shape)
    )

    total = concat([factors(m).scaled(w) for w, m in zip(weights, modules, strict=True)])

    largest = sum(float(change(m).abs().max()) for m in modules)
    assert_equal_up_to_rounding(total.dense().reshape(expected.shape), expected, largest=largest)
    assert total.rank == sum(factors(m).rank for m in modules)


@pytest.mark.parametrize("case", WITH_FACTORS, ids=str)
def test_joined_factors_are_a_lora_module(case: Case) -> None:
    """`merge` writes sums this way: slots, alpha and detection must give the sum back."""
    modules = parts_of(case, 2)
    total = concat([factors(m).scaled(-0.5) for m in modules])
    slots = lora.from_factors(total, case.kernel, torch.float64)
    detected = detect({name: tuple(tensor.shape) for name, tensor in slots.items()})

    assert detected.algorithm is lora.LORA
    assert detected.layout.use_conv_cp == case.layout.use_conv_cp
    expected = -0.5 * (change(modules[0]) + change(modules[1]))
    assert_equal_up_to_rounding(
        evaluate(slots, detected, modules[0], torch.zeros(expected.shape)),
        expected,
        largest=float(change(modules[0]).abs().max() + change(modules[1]).abs().max()),
    )


def evaluate(
    slots: dict[str, torch.Tensor], detected: Detected, like: Module, base: torch.Tensor
) -> torch.Tensor:
    """The change of a module given by its stored tensors alone."""
    return weight_change(detected, bound_of(slots, detected), like.shape, base, strength=1.0)


def bound_of(slots: dict[str, torch.Tensor], detected: Detected) -> Bound:
    alpha = float(slots["alpha"]) if "alpha" in slots else None
    dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, DEFAULT_READING)
    tensors = {name: tensor for name, tensor in slots.items() if name != "alpha"}
    return Bound(tensors, detected.layout, detected.sizes, dims)


@pytest.mark.parametrize("case", [c for c in CASES if c.algorithm.kronecker_parts is not None], ids=str)
def test_the_parts_multiply_to_the_change(case: Case) -> None:
    """A Kronecker product; the kernel stays with the columns of the second part."""
    module = make(case)
    assert case.algorithm.kronecker_parts is not None

    first, second = case.algorithm.kronecker_parts(module.bound())

    product = torch.kron(first.dense(), second.dense())
    assert_equal_up_to_rounding(product.reshape(module.shape), change(module))


# --- linear_in -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_base_dependent_forms_cannot_be_scaled(case: Case) -> None:
    assert case.layout.linear_in or case.algorithm.needs_base


@pytest.mark.parametrize("case", [c for c in CASES if c.layout.linear_in], ids=str)
def test_scaling_the_named_slots_scales_the_change(case: Case) -> None:
    module = make(case)
    # A power of two, so that the products are exact.
    named = {slot: module.tensors[slot] for slot in case.layout.linear_in if slot in module.tensors}
    scaled = module.with_tensors({slot: -0.5 * tensor for slot, tensor in named.items()})

    assert torch.equal(change(scaled), -0.5 * change(module))
    bias = bias_change(module.detected, module.bound(), strength=1.0)
    if bias is not None:
        halved = bias_change(scaled.detected, scaled.bound(), strength=1.0)
        assert halved is not None
        assert torch.equal(halved, -0.5 * bias)


# --- concat --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_CONCAT, ids=str)
@WEIGHTS
def test_concat_is_the_weighted_sum(case: Case, weights: tuple[float, ...]) -> None:
    modules = parts_of(case, len(weights))
    pairs = list(zip(modules, weights, strict=True))
    assert case.algorithm.concat is not None

    slots = case.algorithm.concat([(module.bound(), weight) for module, weight in pairs])

    assert slots is not None
    detected = detect({name: tuple(tensor.shape) for name, tensor in slots.items()})
    assert detected.algorithm is case.algorithm
    assert detected.layout is case.layout
    base = modules[0].base
    changes = [weight_change(m.detected, m.bound(), m.shape, base, strength=1.0) for m in modules]
    expected = sum((w * c for w, c in zip(weights, changes, strict=True)), torch.zeros(base.shape))
    assert_equal_up_to_rounding(
        evaluate(slots, detected, modules[0], base),
        expected,
        largest=sum(float(c.abs().max()) for c in changes),
    )


@pytest.mark.parametrize("case", WITH_CONCAT, ids=str)
def test_concat_sums_the_bias(case: Case) -> None:
    modules = parts_of(case, 2)
    assert case.algorithm.concat is not None
    slots = case.algorithm.concat([(modules[0].bound(), 2.0), (modules[1].bound(), -1.0)])
    assert slots is not None
    detected = detect({name: tuple(tensor.shape) for name, tensor in slots.items()})

    total = bias_change(detected, bound_of(slots, detected), strength=1.0)

    biases = [bias_change(m.detected, m.bound(), strength=1.0) for m in modules]
    if biases[0] is None or biases[1] is None:
        assert total is None
    else:
        assert total is not None
        assert torch.equal(total, 2.0 * biases[0] - biases[1])


def test_a_slot_that_one_part_lacks_counts_as_zero() -> None:
    for case in WITH_CONCAT:
        if case.layout.name in ("diff", "vectors") and case.optional:
            whole, bare = make(case), make(case, seed=1)
            lost = next(slot.name for slot in case.layout.slots if not slot.required)
            assert case.algorithm.concat is not None
            slots = case.algorithm.concat([(bare.without(lost).bound(), 3.0), (whole.bound(), -1.0)])
            assert slots is not None
            assert torch.equal(slots[lost], -whole.tensors[lost])


def test_vectors_on_different_axes_have_no_joint_form() -> None:
    out, into = (
        make(next(c for c in CASES if c.algorithm.name == "ia3" and c.on_input == axis)) for axis in (0, 1)
    )
    assert out.case.algorithm.concat is not None

    assert out.case.algorithm.concat([(out.bound(), 1.0), (into.bound(), 1.0)]) is None


@pytest.mark.parametrize("layout", ["new", "old"])
def test_glora_is_joined_only_while_its_layout_can_be_told(layout: str) -> None:
    """At rank = in the tensors of the old and the new layout look the same."""
    case = next(c for c in CASES if c.algorithm.name == "glora" and c.layout.name == layout)
    ranks = (0, 0, -1)  # 2 + 2 + 1, and in is 5
    parts = [(make(case, seed=i, rank_shift=shift).bound(), 1.0) for i, shift in enumerate(ranks)]
    assert case.algorithm.concat is not None

    assert case.algorithm.concat(parts) is None
    assert case.algorithm.concat(parts[:2]) is not None


def test_glora_of_both_layouts_has_no_joint_form() -> None:
    new, old = (
        make(next(c for c in CASES if c.algorithm.name == "glora" and c.layout.name == layout))
        for layout in ("new", "old")
    )
    assert new.case.algorithm.concat is not None

    assert new.case.algorithm.concat([(new.bound(), 1.0), (old.bound(), 1.0)]) is None
