"""Rows of a module taken, and modules put below each other: exact in ΔW and Δb, or refused.

What each entry of the registry refuses is listed in :data:`TAKES` and :data:`STACKS` with the
reason, and the refusals are tested like the results, so that a capability cannot vanish.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from conformance.rounding import assert_equal_up_to_rounding
from conformance.samples import Case, Module, cases, make, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.algorithms import ALGORITHMS
from lycotool.algorithms.base import Bound, MismatchError
from lycotool.algorithms.detection import (
    Detected,
    bias_change,
    detect,
    stack_rows,
    take_rows,
    weight_change,
)

CASES = cases()
each_case = pytest.mark.parametrize("case", CASES, ids=str)

#: Which rows an entry gives, and why no others.
TAKES = {
    "lora": ("any", ""),
    "dylora": ("any", ""),
    "loha": ("any", ""),
    "ia3": ("any", ""),
    "full": ("any", ""),
    "norm": ("any", ""),
    "glora": ("any", ""),
    "lokr": ("blocks", "a row of w1 makes a whole block of rows"),
    "diag-oft": ("blocks", "a block rotates its rows together"),
    "tlora": ("all", "some rows of the best approximation are not the best one of some rows"),
    "boft": ("none", "the butterfly carries every row into others"),
}

#: Why modules of an entry's layout have no stack in that layout; "" where they have one.
STACKS = {
    ("lora", "plain"): "",
    ("lora", "plain + sparse"): "fused layers are linear, and no trainer writes it for them",
    ("lora", "cp"): "fused layers are linear",
    ("dylora", "plain"): "",
    ("loha", "plain"): "",
    ("loha", "cp"): "fused layers are linear",
    **{("lokr", f"{first}, {second}"): "" for first in ("w1 full", "w1 product")
       for second in ("w2 full", "w2 product", "cp")},
    ("ia3", "vector"): "",
    ("full", "diff"): "",
    ("full", "bias only"): "",
    ("norm", "vectors"): "",
    ("glora", "new"): "the prompt of each part is another",
    ("glora", "old"): "the prompt of each part is another",
    ("diag-oft", "blocks"): "the bound is one for all blocks",
    ("diag-oft", "old"): "blocks of the parts may differ in size",
    ("boft", "butterfly"): "the butterfly carries every row into others",
    ("tlora", "triple"): "the best approximation of the whole is another",
}  # fmt: skip

#: The rows that an entry takes and gives together: the words whose sizes make them.
UNITS = {"lokr": "out2", "diag-oft": "block"}


def unit_of(module: Module) -> int:
    """How many rows belong together."""
    word = UNITS.get(module.case.algorithm.name)
    return module.bound().size(word) if word else 1


def in_units(numbers: Sequence[int], unit: int) -> torch.Tensor:
    """The rows of these units."""
    return torch.tensor([number * unit + row for number in numbers for row in range(unit)])


def shuffled(count: int, seed: int = 0) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


#: Numbers of the wanted units out of ``n``.
SELECTIONS: dict[str, Callable[[int], list[int]]] = {
    "first third": lambda n: list(range(n // 3)),
    "middle": lambda n: list(range(n // 3, 2 * n // 3)),
    "last third": lambda n: list(range(2 * n // 3, n)),
    "halves swapped": lambda n: [*range(n // 2, n), *range(n // 2)],
    "backwards": lambda n: list(range(n))[::-1],
    "shuffled": shuffled,
    "some": lambda n: shuffled(n, seed=1)[: n // 2 + 1],
    "all": lambda n: list(range(n)),
    "one": lambda n: [n - 1],
}
each_selection = pytest.mark.parametrize("selection", SELECTIONS)


def case_of(name: str, layout: str = "", **fields: object) -> Case:
    """The first case with all optional slots, no DoRA and no switches, unless the fields say so."""
    wanted = {"optional": True, "dora_axis": None, "on_input": 0, **fields}
    return next(
        case
        for case in CASES
        if case.algorithm.name == name
        and layout in ("", case.layout.name)
        and all(getattr(case, field) == value for field, value in wanted.items())
    )


@dataclass(frozen=True)
class Part:
    """A module as the functions get it, with the layer it is for."""

    detected: Detected
    bound: Bound
    base: torch.Tensor

    def change(self) -> torch.Tensor:
        shape = tuple(self.base.shape)
        return weight_change(self.detected, self.bound, shape, self.base, strength=1.0)

    def bias(self) -> torch.Tensor | None:
        return bias_change(self.detected, self.bound, strength=1.0)

    def pair(self) -> tuple[Detected, Bound]:
        return self.detected, self.bound


def part_of(module: Module, dtype: torch.dtype = torch.float64) -> Part:
    return Part(module.detected, module.bound(dtype), module.base)


def read_back(slots: dict[str, torch.Tensor], like: Part, base: torch.Tensor, scale: float) -> Part:
    """Slots as a file's reader finds them: recognised anew, read with ``scale``."""
    hint = like.detected.algorithm.name
    detected = detect({name: tuple(tensor.shape) for name, tensor in slots.items()}, algorithm_hint=hint)
    alpha = like.bound.dims.alpha
    dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, like.bound.reading)
    return Part(detected, Bound(slots, detected.layout, detected.sizes, replace(dims, scale=scale)), base)


def taken(part: Part, index: torch.Tensor) -> Part | None:
    slots = take_rows(part.detected, part.bound, index)
    return None if slots is None else read_back(slots, part, part.base[index], part.bound.dims.scale)


def stacked(parts: Sequence[Part | int]) -> Part | None:
    """The parts as one; layers that do not change have weights too."""
    found = stack_rows([part if isinstance(part, int) else part.pair() for part in parts])
    if found is None:
        return None
    first = next(part for part in parts if not isinstance(part, int))
    rest = tuple(first.base.shape[1:])
    base = torch.cat(
        [normal("rest", (part, *rest)) if isinstance(part, int) else part.base for part in parts]
    )
    return read_back(found[0], first, base, found[1])


def assert_same_change(actual: Part, expected: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Up to rounding: the same sums of the same numbers, in another order at most.

    On the way stand the base and changes no larger than the expected one, except in T-LoRA:
    its singular vectors are known up to ``eps · σ₁ / gap`` and count ``σ₁``-fold.
    """
    largest = float(actual.base.abs().max())
    if actual.detected.algorithm.name == "tlora":
        sigma = torch.linalg.svdvals(actual.base.flatten(1))
        rank = actual.bound.size("rank")
        largest = max(largest, float(sigma[0] ** 2 / (sigma[rank - 1] - sigma[rank])))
    assert_equal_up_to_rounding(actual.change(), expected, largest=largest)
    found = actual.bias()
    assert (found is None) == (bias is None)
    if found is not None and bias is not None:
        assert_equal_up_to_rounding(found, bias)


# --- take_rows -----------------------------------------------------------------------------


def test_every_entry_is_listed() -> None:
    assert {algorithm.name for algorithm in ALGORITHMS} == set(TAKES)
    assert {(a.name, layout.name) for a in ALGORITHMS for layout in a.layouts} == set(STACKS)


def test_a_field_is_none_where_nothing_can_be_done() -> None:
    for algorithm in ALGORITHMS:
        assert (algorithm.take_rows is None) == (TAKES[algorithm.name][0] == "none")
        layouts = [STACKS[algorithm.name, layout.name] for layout in algorithm.layouts]
        assert (algorithm.stack_rows is None) == all(layouts)


def why_not_taken(module: Module, index: torch.Tensor) -> str:
    """The reason for None, "" for a result."""
    kind, reason = TAKES[module.case.algorithm.name]
    rows, unit = module.shape[0], unit_of(module)
    everything = sorted(index.tolist()) == list(range(rows))
    runs = index.reshape(-1, unit).tolist() if len(index) % unit == 0 else [[-1]]
    whole = all(run == list(range(run[0], run[0] + unit)) and run[0] % unit == 0 for run in runs)
    if kind == "none" or (kind == "blocks" and not whole) or (kind == "all" and not everything):
        return reason
    if module.case.dora_axis == "in" and not everything:
        return "the norms of columns run over all rows"
    if module.case.dora_axis == "out" and len(index) == 1:
        return "a dora_scale of shape (1, 1) is read as that of one column"
    return ""


def check_taken(module: Module, index: torch.Tensor) -> None:
    whole = part_of(module)
    part = taken(whole, index)

    assert (part is None) == bool(why_not_taken(module, index))
    if part is None:
        return
    assert part.detected.algorithm is whole.detected.algorithm
    assert part.detected.layout is whole.detected.layout
    assert part.detected.dora_axis == whole.detected.dora_axis
    assert part.bound.tensors.keys() == whole.bound.tensors.keys()
    # The stored alpha means what it meant.
    alpha, reading = whole.bound.dims.alpha, whole.bound.reading
    dims = part.detected.algorithm.dims(part.detected.layout, part.detected.sizes, alpha, reading)
    assert dims == whole.bound.dims
    bias = whole.bias()
    assert_same_change(part, whole.change()[index], None if bias is None else bias[index])


@each_case
@each_selection
def test_taken_rows_change_as_they_did(case: Case, selection: str) -> None:
    module = make(case)
    unit = unit_of(module)

    check_taken(module, in_units(SELECTIONS[selection](module.shape[0] // unit), unit))


@pytest.mark.parametrize("case", [c for c in CASES if c.algorithm.name in UNITS], ids=str)
@each_selection
def test_rows_that_cut_a_block(case: Case, selection: str) -> None:
    module = make(case)

    check_taken(module, torch.tensor(SELECTIONS[selection](module.shape[0])))


@pytest.mark.parametrize("case", [c for c in CASES if c.algorithm.name in UNITS], ids=str)
def test_a_run_of_the_right_length_can_cut_two_blocks(case: Case) -> None:
    module = make(case)
    unit = unit_of(module)

    check_taken(module, torch.arange(unit) + 1)
    check_taken(module, torch.arange(unit).flip(0))


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_taken_rows_keep_their_dtypes(case: Case, dtype: torch.dtype) -> None:
    module = make(case)
    if case.algorithm.name == "diag-oft" and dtype.itemsize == 1:
        dtype = torch.float16  # nothing computes with 8 bits, which the bound takes
    bound = module.bound(dtype)
    unit = unit_of(module)
    index = in_units(SELECTIONS["backwards"](module.shape[0] // unit), unit)

    slots = take_rows(module.detected, bound, index)

    assert (slots is None) == (case.algorithm.name == "boft")
    for slot, tensor in (slots or {}).items():
        assert tensor.dtype == bound[slot].dtype
        assert tensor.ndim == bound[slot].ndim


# --- rows of the sparse part ----------------------------------------------------------------


def sparse_module(rows: int, places: list[list[int]]) -> Module:
    """A LoRA with this many rows and a value at each of these places."""
    case = replace(case_of("lora", "plain + sparse"), optional=False)
    tensors = {
        "lora_up.weight": normal("up", (rows, 1)),
        "lora_down.weight": normal("down", (1, 3)),
        "bias_indices": torch.tensor(places).to(torch.int16),
        "bias_values": normal("values", (len(places[0]),)),
        "bias_size": torch.tensor([rows, 3]).to(torch.int16),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Module(case, case.layout.bind(shapes), (rows, 3), tensors)


@pytest.mark.parametrize("selection", ["last third", "halves swapped", "shuffled", "some"])
def test_sparse_rows_beyond_16_bits_wrap(selection: str) -> None:
    """Rows above 32767 are stored as negative numbers, before and after."""
    module = sparse_module(60_000, [[0, 19_999, 32_767, 32_768, 59_999], [0, 1, 2, 0, 1]])

    check_taken(module, torch.tensor(SELECTIONS[selection](60_000)))


def test_sparse_values_at_one_place_add() -> None:
    module = sparse_module(6, [[4, 1, 4], [2, 0, 2]])

    check_taken(module, torch.tensor([4, 0]))


def test_rows_without_sparse_values_keep_an_empty_part() -> None:
    part = taken(part_of(sparse_module(6, [[4, 1], [2, 0]])), torch.tensor([0, 5, 2]))

    assert part is not None
    assert part.bound["bias_indices"].shape == (2, 0)
    assert part.bound["bias_size"].tolist() == [3, 3]
    assert part.bound["bias_size"].dtype == part.bound["bias_indices"].dtype == torch.int16


def test_a_sparse_part_of_another_matrix_is_refused() -> None:
    module = sparse_module(6, [[4, 1], [2, 0]])
    wrong = module.with_tensors({"bias_size": torch.tensor([7, 3], dtype=torch.int16)})

    with pytest.raises(MismatchError, match="bias_size"):
        taken(part_of(wrong), torch.arange(6))


# --- rows under a bound, a prompt, a vector -------------------------------------------------


def oft(blocks: torch.Tensor, alpha: float) -> Module:
    """A Diag-OFT with these blocks, 30 rows in 5 blocks of 6."""
    module = make(case_of("diag-oft", "blocks"))
    assert module.header["oft_blocks"] == tuple(blocks.shape) == (5, 6, 6)
    return module.with_tensors({"oft_blocks": blocks, "alpha": torch.tensor(alpha)})


def norm_of(blocks: torch.Tensor) -> float:
    """``‖B - Bᵀ‖``, which the bound is for."""
    return float((blocks - blocks.transpose(-1, -2)).norm())


def test_a_bound_that_shrinks_the_whole_holds_its_blocks_together() -> None:
    blocks = normal("oft", (5, 6, 6))
    blocks[1:] *= 1e-3  # alone within the bound
    module = oft(blocks, alpha=norm_of(blocks) / 30 * 0.99)

    assert taken(part_of(module), torch.arange(6, 30)) is None
    order = taken(part_of(module), torch.arange(30).roll(6))  # the same bound for the same blocks
    assert order is not None
    assert_same_change(order, part_of(module).change().roll(6, dims=0), None)


def test_a_bound_that_would_shrink_a_part_does_not_let_it_go() -> None:
    """The part's bound is smaller because it has fewer rows."""
    blocks = normal("oft", (5, 6, 6))
    blocks[1:] *= 1e-3
    module = oft(blocks, alpha=norm_of(blocks) / 30 * 1.01)

    assert taken(part_of(module), torch.arange(6)) is None
    rest = taken(part_of(module), torch.arange(6, 30))
    assert rest is not None
    assert_same_change(rest, part_of(module).change()[6:], None)


def test_stored_rotations_have_no_bound() -> None:
    module = make(case_of("diag-oft", "old"))
    bounded = module.with_tensors({"alpha": torch.tensor(1e-6)})

    check_taken(bounded, torch.arange(unit_of(module)))


@pytest.mark.parametrize("layout", ["new", "old"])
def test_glora_rows_are_given_only_while_the_layout_can_be_told(layout: str) -> None:
    case = case_of("glora", layout)

    assert taken(part_of(make(case, rank_shift=2)), torch.arange(3)) is not None  # rank 4 of 5
    assert taken(part_of(make(case, rank_shift=3)), torch.arange(3)) is None


def test_a_row_that_an_ia3_vector_does_not_have_is_refused() -> None:
    module = make(case_of("ia3"))

    with pytest.raises(MismatchError, match="weight has 7 elements"):
        taken(part_of(module), torch.tensor([3, 7]))


def test_an_ia3_vector_on_the_input_stays_as_it_is() -> None:
    whole = part_of(make(case_of("ia3", on_input=1)))
    part = taken(whole, torch.tensor([3, 1]))

    assert part is not None
    assert torch.equal(part.bound["weight"], whole.bound["weight"])


# --- stack_rows ----------------------------------------------------------------------------


def shared_slots(case: Case) -> set[str]:
    """What modules must have in common to be stacked in their layout."""
    if case.algorithm.name == "lokr":
        return set(case.layout.required) - {"lokr_w1", "lokr_w1_a"}
    return {"weight"} if case.on_input else set()


def parts_of(case: Case, *, scales: str = "one") -> list[Part]:
    """Three parts of different rows, and different ranks where the layout lets them.

    Parameters
    ----------
    scales
        ``one`` for all or ``mixed``.
    """
    shared = shared_slots(case)
    modules = []
    for number in range(3):
        # Ranks 2, 3, 2.
        module = make(case, rank_shift=0 if shared else number % 2, seed=number)
        if number:
            module = module.with_tensors({slot: modules[0].tensors[slot] for slot in shared})
        rank = module.bound().dims.rank
        if rank is not None and "alpha" in case.layout.names:
            scale = (0.75, 0.75, 0.75) if scales == "one" else (0.75, -2.0, 1.5)
            module = module.with_tensors({"alpha": torch.tensor(scale[number] * rank, dtype=torch.float64)})
        modules.append(module)
    parts = [
        replace(part_of(module), base=normal(f"base {i}", module.shape)) for i, module in enumerate(modules)
    ]
    unit = unit_of(modules[0])
    fewer = taken(parts[1], torch.arange(2 * unit)) if case.dora_axis != "in" else None
    return [parts[0], fewer or parts[1], parts[2]]


def have_scales(case: Case) -> bool:
    return parts_of(case)[0].bound.dims.rank is not None


def why_not_stacked(case: Case, *, with_rows: bool, scales: str) -> str:
    """The reason for None, "" for a result."""
    if STACKS[case.algorithm.name, case.layout.name]:
        return STACKS[case.algorithm.name, case.layout.name]
    if case.dora_axis == "in":
        return "the norms of columns run over all rows"
    if case.dora_axis == "out" and with_rows:
        return "only the base tells the norms of rows that do not change"
    if case.on_input and with_rows:
        return "a factor on the input changes every row"
    if case.algorithm.name == "lokr" and scales == "mixed" and have_scales(case):
        return "the layout has one scale, and w1 would have to hold the others"
    return ""


@each_case
@pytest.mark.parametrize("scales", ["one", "mixed"])
@pytest.mark.parametrize("with_rows", [False, True], ids=["modules", "modules and rows"])
def test_a_stack_changes_as_its_parts(case: Case, scales: str, with_rows: bool) -> None:
    modules = parts_of(case, scales=scales)
    unit = unit_of(make(case))
    parts: list[Part | int] = (
        [unit, modules[0], modules[1], 2 * unit, modules[2]] if with_rows else [*modules]
    )
    whole = stacked(parts)

    assert (whole is None) == bool(why_not_stacked(case, with_rows=with_rows, scales=scales))
    if whole is None:
        return
    assert whole.detected.algorithm is case.algorithm
    assert whole.detected.layout is case.layout
    assert whole.detected.dora_axis == case.dora_axis
    if have_scales(case):
        assert whole.bound.dims.scale == (0.75 if scales == "one" else 1.0)
    rest = modules[0].base.shape[1:]
    changes = [torch.zeros(part, *rest) if isinstance(part, int) else part.change() for part in parts]
    assert_same_change(whole, torch.cat(changes), joined_biases(parts))


def joined_biases(parts: Sequence[Part | int]) -> torch.Tensor | None:
    """Below each other, zeros where there is none; None if no part has one."""
    found = [None if isinstance(part, int) else part.bias() for part in parts]
    if all(bias is None for bias in found):
        return None
    rows = (part if isinstance(part, int) else part.base.shape[0] for part in parts)
    return torch.cat([torch.zeros(n) if bias is None else bias for bias, n in zip(found, rows, strict=True)])


BIASES = [
    (case, slot)
    for case in CASES
    for slot in ("lora_up.bias", "diff_b", "b_norm")
    if case.optional and slot in case.layout.names - case.layout.required
]


@pytest.mark.parametrize(("case", "lost"), [p for p in BIASES if p[0].dora_axis != "in"], ids=str)
def test_a_missing_bias_is_zero(case: Case, lost: str) -> None:
    parts = parts_of(case)
    bare = {slot: tensor for slot, tensor in parts[1].bound.tensors.items() if slot != lost}
    parts[1] = replace(parts[1], bound=replace(parts[1].bound, tensors=bare))
    whole = stacked(parts)

    # A vector on the input does not tell how many zeros.
    refused = bool(case.on_input or STACKS[case.algorithm.name, case.layout.name])
    assert (whole is None) == refused
    if whole is not None:
        assert_same_change(whole, torch.cat([part.change() for part in parts]), joined_biases(parts))


def test_a_difference_beside_a_change_of_the_bias_alone() -> None:
    whole, bias = part_of(make(case_of("full", "diff"))), part_of(make(case_of("full", "bias only")))
    bias = replace(bias, base=normal("bias", (bias.base.shape[0], *whole.base.shape[1:])))
    joined = stacked([bias, whole, 2])

    assert joined is not None
    changes = [torch.zeros(bias.base.shape), whole.change(), torch.zeros(2, *whole.base.shape[1:])]
    assert_same_change(joined, torch.cat(changes), joined_biases([bias, whole, 2]))


# --- there and back ------------------------------------------------------------------------

STACKABLE = [c for c in CASES if not why_not_stacked(c, with_rows=False, scales="one")]


@pytest.mark.parametrize("case", STACKABLE, ids=str)
def test_thirds_put_together_are_the_module_itself(case: Case) -> None:
    """Bit for bit: ranks, dtypes and scale too."""
    whole = part_of(make(case))
    unit = unit_of(make(case))
    count = whole.base.shape[0] // unit
    cuts = [range(2), range(2, 4), range(4, count)]
    thirds = [taken(whole, in_units(list(cut), unit)) for cut in cuts if len(cut) > 0]
    # One row has no DoRA of its own; see why_not_taken.
    if any(third is None for third in thirds):
        assert case.dora_axis == "out"
        thirds = [taken(whole, in_units(list(cut), unit)) for cut in (range(2), range(2, count))]

    found = stack_rows([third.pair() for third in thirds if third is not None])

    assert found is not None
    slots, scale = found
    assert scale == whole.bound.dims.scale
    assert slots.keys() == whole.bound.tensors.keys()
    for slot, tensor in slots.items():
        assert tensor.dtype == whole.bound[slot].dtype
        assert torch.equal(tensor, whole.bound[slot]), slot


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(["lora", "loha", "full", "norm", "ia3"]),
    cuts=st.sets(st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_any_cuts_in_any_order_put_together(name: str, cuts: set[int], seed: int) -> None:
    whole = part_of(make(case_of(name)))
    rows = whole.base.shape[0]
    order = torch.tensor(shuffled(rows, seed))
    places = [0, *sorted(cut for cut in cuts if cut < rows), rows]
    pieces = [taken(whole, order[start:end]) for start, end in pairwise(places)]

    found = stack_rows([piece.pair() for piece in pieces if piece is not None])

    assert found is not None
    reordered = take_rows(*whole.pair(), order)
    assert reordered is not None
    assert found[0].keys() == reordered.keys()
    assert all(torch.equal(tensor, reordered[slot]) for slot, tensor in found[0].items())


# --- ranks ---------------------------------------------------------------------------------


def with_slots(part: Part, **slots: torch.Tensor) -> Part:
    renamed = {name.replace("__", "."): tensor for name, tensor in slots.items()}
    return replace(part, bound=replace(part.bound, tensors={**part.bound.tensors, **renamed}))


def with_scale(part: Part, scale: float) -> Part:
    return replace(part, bound=replace(part.bound, dims=replace(part.bound.dims, scale=scale)))


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 2.0, -1.0)], ids=["one scale", "mixed scales"])
@pytest.mark.parametrize(
    ("downs", "rank"), [((0, 0, 0), 2), ((0, 1, 2), 6), ((0, 1, 0), 4), ((1, 1, 0), 4)], ids=str
)
def test_equal_downs_stand_once(downs: tuple[int, ...], rank: int, scales: tuple[float, ...]) -> None:
    case = case_of("lora", "plain")
    distinct = [make(case, seed=i).bound()["lora_down.weight"] for i in range(3)]
    parts = [
        with_scale(with_slots(part_of(make(case, seed=i)), lora_down__weight=distinct[down]), scale)
        for i, (down, scale) in enumerate(zip(downs, scales, strict=True))
    ]

    whole = stacked([*parts, 3])

    assert whole is not None
    assert whole.bound["lora_down.weight"].shape[0] == whole.bound["lora_up.weight"].shape[1] == rank
    assert whole.bound.dims.scale == (0.5 if len(set(scales)) == 1 else 1.0)
    changes = [*(part.change() for part in parts), torch.zeros(3, *parts[0].base.shape[1:])]
    assert_same_change(whole, torch.cat(changes), joined_biases([*parts, 3]))


@pytest.mark.parametrize(
    ("equal", "ranks"),
    [
        (("hada_w1_b", "hada_w2_b"), (2, 3)),
        (("hada_w1_b",), (4, 6)),  # both add, so that a file's one rank stays one
        ((), (4, 6)),
    ],
    ids=str,
)
def test_the_ranks_of_a_loha_add_unless_both_downs_are_equal(
    equal: tuple[str, ...], ranks: tuple[int, int]
) -> None:
    case = case_of("loha", "plain")
    first, second = (part_of(make(case, seed=i)) for i in range(2))
    second = with_slots(second, **{slot: first.bound[slot] for slot in equal})

    whole = stacked([first, 2, second])

    assert whole is not None
    assert (whole.bound["hada_w1_b"].shape[0], whole.bound["hada_w2_b"].shape[0]) == ranks
    zeros = torch.zeros(2, *first.base.shape[1:])
    assert_same_change(
        whole, torch.cat([first.change(), zeros, second.change()]), joined_biases([first, 2, second])
    )


# --- what has no stack ---------------------------------------------------------------------


def lokr_parts(layout: str) -> list[Part]:
    return parts_of(case_of("lokr", layout))


@pytest.mark.parametrize(
    ("layout", "slot"),
    [
        ("w1 full, w2 full", "lokr_w2"),
        ("w1 product, w2 full", "lokr_w1_b"),
        ("w1 full, w2 product", "lokr_w2_a"),
        ("w1 full, w2 product", "lokr_w2_b"),
        ("w1 full, cp", "lokr_t2"),
    ],
)
def test_lokr_parts_must_agree_in_all_but_the_rows_of_w1(layout: str, slot: str) -> None:
    parts = lokr_parts(layout)
    last = parts[2].bound[slot].clone()
    last.flatten()[-1] *= 1 + torch.finfo(last.dtype).eps  # one bit

    assert stacked([*parts[:2], with_slots(parts[2], **{slot: last})]) is None
    assert stacked(parts) is not None


def test_unchanged_rows_of_a_lokr_come_in_blocks() -> None:
    parts = lokr_parts("w1 full, w2 full")
    unit = parts[0].bound.size("out2")

    assert stacked([parts[0], unit - 1]) is None
    assert stacked([parts[0], 2 * unit]) is not None


def test_lokr_parts_of_two_layouts_have_no_stack() -> None:
    whole, product = (lokr_parts(f"{first}, w2 full")[0] for first in ("w1 full", "w1 product"))
    product = with_slots(with_scale(product, 1.0), lokr_w2=whole.bound["lokr_w2"])

    assert whole.bound.dims.scale == 1.0
    assert stacked([whole, product]) is None
    assert stacked([product, whole]) is None


@pytest.mark.parametrize("name", ["lora", "loha", "full"])
def test_parts_of_different_widths_have_no_stack(name: str) -> None:
    part = part_of(make(case_of(name)))
    slots = {"lora": ["lora_down.weight"], "loha": ["hada_w1_b", "hada_w2_b"], "full": ["diff"]}[name]
    narrow = with_slots(part, **{slot: part.bound[slot][:, :-1] for slot in slots})

    assert stack_rows([part.pair(), narrow.pair()]) is None


def test_lokr_parts_of_different_widths_have_no_stack() -> None:
    part = lokr_parts("w1 full, w2 full")[0]
    narrow = with_slots(part, lokr_w1=part.bound["lokr_w1"][:, :-1])

    assert stack_rows([part.pair(), narrow.pair()]) is None


def test_vectors_on_different_axes_have_no_stack() -> None:
    parts = [part_of(make(case_of("ia3", on_input=on_input))) for on_input in (0, 1)]

    assert stacked(parts) is None


def test_different_vectors_on_the_input_have_no_stack() -> None:
    parts = [part_of(make(case_of("ia3", on_input=1), seed=seed)) for seed in (0, 1)]

    assert stacked(parts) is None


def test_parts_of_different_algorithms_have_no_stack() -> None:
    lora, full = part_of(make(case_of("lora", "plain"))), part_of(make(case_of("full", "diff")))

    assert stack_rows([lora.pair(), full.pair()]) is None
    assert stack_rows([full.pair(), lora.pair()]) is None


# --- DoRA ----------------------------------------------------------------------------------


def test_dora_beside_none_has_no_stack() -> None:
    plain, dora = (part_of(make(case_of("lora", "plain", dora_axis=axis))) for axis in (None, "out"))

    assert stack_rows([plain.pair(), dora.pair()]) is None
    assert stack_rows([dora.pair(), plain.pair()]) is None


@pytest.mark.parametrize(
    ("slot", "shape"),
    [
        ("dora_scale", (-1, 1)),
        ("dora_scale", (-1,)),
        ("lora_magnitude_vector", (-1,)),
        ("lora_magnitude_vector", (1, -1, 1, 1)),  # PEFT's for convolutions
    ],
)
def test_a_magnitude_keeps_its_form(slot: str, shape: tuple[int, ...]) -> None:
    module = make(case_of("lora", "plain", dora_axis="out"))
    magnitude = module.tensors["dora_scale"].reshape(shape)
    module = module.without("dora_scale").with_tensors({slot: magnitude})
    whole = part_of(module)
    order = torch.tensor([3, 4, 0, 2, 1])

    pieces = [taken(whole, order[:2]), taken(whole, order[2:])]
    assert all(piece is not None and piece.bound[slot].ndim == len(shape) for piece in pieces)
    joined = stacked([piece for piece in pieces if piece is not None])

    assert joined is not None
    assert torch.equal(joined.bound[slot], magnitude.flatten()[order].reshape(shape))
    bias = whole.bias()
    assert bias is not None
    assert_same_change(joined, whole.change()[order], bias[order])


def test_one_row_of_peft_is_told_by_its_name() -> None:
    module = make(case_of("lora", "plain", dora_axis="out"))
    vector = module.tensors["dora_scale"].flatten()
    whole = part_of(module.without("dora_scale").with_tensors({"lora_magnitude_vector": vector}))
    part = taken(whole, torch.tensor([2]))

    assert part is not None
    bias = whole.bias()
    assert bias is not None
    assert_same_change(part, whole.change()[2:3], bias[2:3])


# --- dtypes --------------------------------------------------------------------------------


def stored_as(case: Case, *dtypes: torch.dtype) -> list[tuple[Detected, Bound]]:
    modules = [make(case, seed=seed) for seed in range(len(dtypes))]
    shared = {slot: modules[0].tensors[slot] for slot in shared_slots(case)}
    return [
        (module.detected, module.with_tensors(shared).bound(dtype))
        for module, dtype in zip(modules, dtypes, strict=True)
    ]


@pytest.mark.parametrize("case", STACKABLE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_stack_keeps_the_dtype(case: Case, dtype: torch.dtype) -> None:
    parts = stored_as(case, dtype, dtype)
    found = stack_rows(parts)

    assert found is not None
    assert {slot: tensor.dtype for slot, tensor in found[0].items()} == {
        slot: tensor.dtype for slot, tensor in parts[0][1].tensors.items()
    }


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["lora", "loha", "full"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_different_dtypes_meet_in_one_that_holds_both(
    name: str, first: torch.dtype, second: torch.dtype, common: torch.dtype, scale: float
) -> None:
    (detected, one), (_, other) = stored_as(case_of(name), first, second)
    other = replace(other, dims=replace(other.dims, scale=scale * one.dims.scale))
    found = stack_rows([(detected, one), (detected, other)])

    assert found is not None
    assert {tensor.dtype for tensor in found[0].values()} == {common}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_folded_scale_rounds_once(dtype: torch.dtype) -> None:
    """In float32, and to the stored dtype at the end."""
    case = case_of("lora", "plain")
    parts = [replace(b, dims=replace(b.dims, scale=c)) for (_, b), c in
             zip(stored_as(case, dtype, dtype), (0.3, 0.7), strict=True)]  # fmt: skip
    found = stack_rows([(make(case).detected, part) for part in parts])

    assert found is not None
    slots, scale = found
    assert scale == 1.0
    for slot in ("lora_up.weight", "lora_up.bias"):
        expected = torch.cat([(part[slot].float() * part.dims.scale).to(dtype).flatten() for part in parts])
        assert torch.equal(slots[slot].flatten()[slots[slot].flatten() != 0], expected)
    assert torch.equal(slots["diff_b"], torch.cat([part["diff_b"] for part in parts]))
