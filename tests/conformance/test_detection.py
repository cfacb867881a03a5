"""Every stored form is recognised by exactly one layout, and damage to it is named."""

import math
import random

import pytest
from conformance.samples import Case, cases, claimed, make, tied_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.algorithms import ALGORITHMS, BY_METADATA
from lycotool.algorithms.base import Header, Layout, MismatchError, Sizes
from lycotool.algorithms.detection import detect

CASES = cases()
each_case = pytest.mark.parametrize("case", CASES, ids=str)

#: Leaves of a module that are a whole module of another kind when this slot is lost, so
#: that only the shapes (or nothing) can tell.
LOSSES_THAT_LEAVE_A_MODULE = {
    ("lora", "cp", "lora_mid.weight"),
    ("lokr", "w1 full, cp", "lokr_t2"),
    ("lokr", "w1 product, cp", "lokr_t2"),
    ("full", "diff", "diff"),
}


def _fits(layout: Layout, header: Header) -> bool:
    if not layout.claims(header):
        return False
    try:
        layout.bind(header)
    except MismatchError:
        return False
    return True


@each_case
def test_exactly_one_layout_fits(case: Case) -> None:
    header = {name: shape for name, shape in make(case).header.items() if name != "dora_scale"}

    fitting = [
        (algorithm.name, layout.name)
        for algorithm in ALGORITHMS
        if (algorithm.name in BY_METADATA) == (case.algorithm.name in BY_METADATA)
        for layout in algorithm.layouts
        if _fits(layout, header)
    ]

    assert fitting == [(case.algorithm.name, case.layout.name)]


@each_case
def test_detection_names_the_case(case: Case) -> None:
    detected = make(case).detected

    assert detected.algorithm is case.algorithm
    assert detected.layout is case.layout
    assert detected.dora_axis == case.dora_axis
    assert detected.needs_base == (case.algorithm.needs_base or case.dora_axis is not None)


@each_case
def test_detection_survives_shuffled_keys(case: Case) -> None:
    module = make(case)
    entries = list(module.header.items())

    for seed in range(3):
        random.Random(seed).shuffle(entries)
        assert detect(dict(entries), algorithm_hint=case.hint) == module.detected


def test_a_hint_for_another_layout_changes_nothing() -> None:
    case = next(c for c in CASES if c.algorithm.name == "loha")

    assert detect(make(case).header, algorithm_hint="dylora").algorithm.name == "loha"


@each_case
def test_a_missing_slot_is_named(case: Case) -> None:
    module = make(case)

    for slot in case.layout.required:
        rest = module.without(slot)
        if claimed({n: s for n, s in rest.header.items() if n != "dora_scale"}):
            assert (case.algorithm.name, case.layout.name, slot) in LOSSES_THAT_LEAVE_A_MODULE
            continue
        # Where nothing of the layout is left, nothing can tell which one it was.
        expected = slot if case.layout.required & rest.header.keys() else "missing"
        with pytest.raises(MismatchError, match=expected.replace(".", r"\.")):
            detect(rest.header, algorithm_hint=case.hint)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.layout.use_conv_cp and c.algorithm.name in ("lora", "lokr")], ids=str
)
def test_a_lost_core_is_seen_where_the_ranks_differ(case: Case) -> None:
    rest = make(case).without("lora_mid.weight" if case.algorithm.name == "lora" else "lokr_t2")

    with pytest.raises(MismatchError, match=r"lora_down|lokr_w2_b"):
        detect(rest.header)


@each_case
def test_a_foreign_slot_is_named(case: Case) -> None:
    header = make(case).header | {"no_such_slot": (3, 3)}

    with pytest.raises(MismatchError, match="no_such_slot"):
        detect(header, algorithm_hint=case.hint)


@pytest.mark.parametrize("case", [c for c in CASES if any(tied_sizes(make(c)))], ids=str)
def test_a_broken_size_is_named(case: Case) -> None:
    module = make(case)

    for slot, axis in tied_sizes(module):
        shape = list(module.header[slot])
        shape[axis] += 1
        with pytest.raises(MismatchError, match=slot.replace(".", r"\.")):
            detect(module.header | {slot: tuple(shape)}, algorithm_hint=case.hint)


@each_case
def test_an_empty_size_is_named(case: Case) -> None:
    module = make(case)

    for slot in case.layout.slots:
        if slot.name in module.tensors and slot.axes != "scalar" and not slot.may_be_empty:
            shape = module.header[slot.name]
            for axis in range(len(shape)):
                empty = (*shape[:axis], 0, *shape[axis + 1 :])
                with pytest.raises(MismatchError, match=slot.name.replace(".", r"\.")):
                    detect(module.header | {slot.name: empty}, algorithm_hint=case.hint)


@each_case
def test_a_surplus_axis_is_named(case: Case) -> None:
    module = make(case)

    for slot in case.layout.slots:
        last = slot.axes.split()[-1]
        if slot.name in module.tensors and (last == "*1" or not last.startswith("*")):
            shape = (*module.header[slot.name], 2)
            with pytest.raises(MismatchError, match=slot.name.replace(".", r"\.")):
                detect(module.header | {slot.name: shape}, algorithm_hint=case.hint)


def test_a_sparse_part_may_have_no_elements() -> None:
    """LyCORIS' extraction writes one for a layer that did not change."""
    case = next(c for c in CASES if c.layout.name == "plain + sparse")
    header = make(case).header | {"bias_indices": (2, 0), "bias_values": (0,)}

    assert detect(header).layout is case.layout


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_alpha_may_have_no_axis_or_one(shape: tuple[int, ...]) -> None:
    for case in CASES:
        if "alpha" in case.layout.names:
            header = make(case).header | {"alpha": shape}
            assert detect(header, algorithm_hint=case.hint).layout is case.layout


def test_dora_over_other_algorithms_is_refused() -> None:
    for case in CASES:
        if not case.algorithm.allows_dora and case.hint is None:
            with pytest.raises(MismatchError, match=f"dora_scale beside {case.algorithm.name}"):
                detect(make(case).header | {"dora_scale": (5, 1)})


def test_two_magnitudes_are_refused() -> None:
    case = next(c for c in CASES if c.dora_axis == "out")
    header = make(case).header | {"lora_magnitude_vector": (5,)}

    with pytest.raises(MismatchError, match="both dora_scale and lora_magnitude_vector"):
        detect(header)


@pytest.mark.parametrize(
    ("slot", "shape", "axis"),
    [
        ("dora_scale", (5, 1), "out"),
        ("dora_scale", (5,), "out"),
        ("dora_scale", (5, 1, 1, 1), "out"),
        ("dora_scale", (1, 6), "in"),
        ("dora_scale", (1, 6, 1, 1), "in"),
        # PEFT keeps (1, out, 1, 1) for convolutions.
        ("lora_magnitude_vector", (1, 5, 1, 1), "out"),
        ("lora_magnitude_vector", (5,), "out"),
    ],
)
def test_the_axis_of_a_magnitude(slot: str, shape: tuple[int, ...], axis: str) -> None:
    case = next(c for c in CASES if c.algorithm.name == "lora" and c.dora_axis is None)

    assert detect(make(case).header | {slot: shape}).dora_axis == axis


@pytest.mark.parametrize("shape", [(), (5, 6), (1, 5, 6)], ids=str)
def test_a_magnitude_is_a_vector(shape: tuple[int, ...]) -> None:
    case = next(c for c in CASES if c.algorithm.name == "lora" and c.dora_axis is None)

    with pytest.raises(MismatchError, match="dora_scale has shape"):
        detect(make(case).header | {"dora_scale": shape})


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_one_layout_fits_whatever_the_sizes(data: st.DataObject) -> None:
    """Equal sizes, rank 1 and square layers included: names and axes are enough."""
    algorithm = data.draw(st.sampled_from([a for a in ALGORITHMS if a.name not in BY_METADATA]))
    layout = data.draw(st.sampled_from(algorithm.layouts))
    slots = [s for s in layout.slots if s.required or data.draw(st.booleans())]
    kernel = data.draw(st.sampled_from([(), (1,), (3, 3), (1, 1, 1)]))
    sizes = data.draw(
        st.fixed_dictionaries(
            {
                word: st.integers(min_value=1, max_value=6)
                for slot in layout.slots
                for word in slot.axes.split()
                if "*" not in word and not word.isdigit() and word != "scalar"
            }
        )
    )
    header = {slot.name: _shape(slot.axes, sizes, kernel) for slot in slots}
    try:
        bound = layout.bind(header)
    except MismatchError:
        return  # sizes the layout says it cannot have
    if layout.prefers is not None and not layout.prefers(bound):
        return  # another layout may fit as well, and is the likelier one

    assert detect(header).layout is layout


def _shape(axes: str, sizes: Sizes, kernel: tuple[int, ...]) -> tuple[int, ...]:
    found: list[int] = []
    for word in axes.split():
        if word == "*1":
            found += [1] * len(kernel)
        elif word.startswith("*"):
            found += kernel
        elif word != "scalar":
            found.append(math.prod(int(f) if f.isdigit() else sizes[f] for f in word.split("*")))
    return tuple(found)


@pytest.mark.parametrize("layout", ["new", "old"])
def test_glora_on_a_square_layer_is_told_by_its_low_rank(layout: str) -> None:
    wide, tall = (2, 4), (4, 2)
    slots = (tall, wide, tall, wide) if layout == "new" else (wide, tall, wide, tall)
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")

    assert detect(dict(zip(names, slots, strict=True))).layout.name == layout


def test_glora_with_nothing_but_square_tensors_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"fits both glora \(new\) and glora \(old\)"):
        detect({f"{name}.weight": (4, 4) for name in ("a1", "a2", "b1", "b2")})


def test_no_number_of_butterfly_stages_takes_long() -> None:
    """``2**stages`` of a hostile header would be a number of any length."""
    with pytest.raises(MismatchError):
        detect({"oft_blocks": (2**40, 2, 4, 4)})
