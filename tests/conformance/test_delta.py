"""What the formula of every stored form must do, whatever it computes."""

import math
from dataclasses import replace

import pytest
import torch
from conformance.rounding import assert_equal_up_to_rounding
from conformance.samples import Case, Module, cases, make

from lycotool.algorithms.base import MismatchError, Reading
from lycotool.algorithms.detection import bias_change, weight_change

CASES = cases()
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def change(
    module: Module,
    *,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    reading: Reading | None = None,
) -> torch.Tensor:
    """The change of the module's weight, with its base."""
    bound = module.bound(dtype, reading or Reading())
    return weight_change(module.detected, bound, module.shape, module.base.to(dtype), strength=strength)


@each_case
def test_the_change_has_the_layers_shape(case: Case) -> None:
    module = make(case)

    assert change(module).shape == module.shape


@each_case
def test_rows_and_columns_are_those_of_the_layer(case: Case) -> None:
    module = make(case)

    assert case.layout.rows(module.sizes) in (None, module.shape[0])
    assert case.layout.columns(module.sizes) in (None, math.prod(module.shape[1:]))


@each_case
def test_the_change_is_not_zero(case: Case) -> None:
    """Guards the other tests of this module: zero would pass most of them."""
    module = make(case)
    bias = bias_change(module.detected, module.bound(), strength=1.0)

    assert change(module).any() or (bias is not None and bias.any())


@each_case
def test_float32_agrees_with_float64(case: Case) -> None:
    module = make(case)
    exact = change(module)

    # On the way stand two sums of at most 20 terms, no larger than their result or the base.
    largest = float(module.base.abs().max())
    assert_equal_up_to_rounding(
        change(module, dtype=torch.float32), exact, dtype=torch.float32, largest=largest, operations=40
    )


@each_case
def test_strength_zero_gives_the_base_back(case: Case) -> None:
    module = make(case)

    assert torch.equal(module.base + change(module, strength=0.0), module.base)


@each_case
@pytest.mark.parametrize("strength", [-1.0, 0.5])
def test_the_change_is_linear_in_strength(case: Case, strength: float) -> None:
    module = make(case)

    # Exact: multiplying by a power of two does not round.
    assert torch.equal(change(module, strength=strength), strength * change(module))


@each_case
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_memory_for_the_change_changes_nothing(case: Case, strength: float) -> None:
    """The same bits whether or not there is memory to put it in, which held anything."""
    module = make(case)
    base = module.base.float()
    memory = torch.full((base.numel(),), torch.nan)
    bound = replace(module.bound(torch.float32), memory=memory)
    change = weight_change(module.detected, bound, module.shape, base.clone(), strength=strength)
    without = weight_change(
        module.detected, module.bound(torch.float32), module.shape, base, strength=strength
    )

    assert torch.equal(change, without)
    uses_memory = case.algorithm.name in ("lora", "loha", "lokr") and case.layout.name != "plain + sparse"
    if uses_memory and case.dora_axis is None:
        assert change.data_ptr() == memory.data_ptr()


@each_case
@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5])
def test_the_change_of_the_bias_is_linear_in_strength(case: Case, strength: float) -> None:
    module = make(case)
    whole = bias_change(module.detected, module.bound(), strength=1.0)
    part = bias_change(module.detected, module.bound(), strength=strength)

    if whole is None or part is None:
        assert whole is part
        assert not {"diff_b", "b_norm", "lora_up.bias"} & module.tensors.keys()
    else:
        assert torch.equal(part, strength * whole)
        assert whole.shape == (module.shape[0],)


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.algorithm.needs_base and c.dora_axis is None], ids=str
)
def test_an_additive_change_ignores_the_base(case: Case) -> None:
    module = make(case)
    without = weight_change(module.detected, module.bound(), module.shape, None, strength=1.0)

    assert torch.equal(without, change(module))
    assert not module.detected.needs_base


@pytest.mark.parametrize("case", [c for c in CASES if c.algorithm.needs_base or c.dora_axis], ids=str)
def test_a_change_that_needs_the_base_demands_it(case: Case) -> None:
    module = make(case)

    assert module.detected.needs_base
    with pytest.raises(ValueError, match="needs the base weight"):
        weight_change(module.detected, module.bound(), module.shape, None, strength=1.0)


@each_case
def test_a_change_says_what_it_depends_on(case: Case) -> None:
    module = make(case)
    other = weight_change(
        module.detected, module.bound(), module.shape, module.base.flip(0) + 1.0, strength=1.0
    )

    assert torch.equal(other, change(module)) != module.detected.needs_base


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.layout.use_conv_cp and c.kernel == (1, 1) and c.optional and not c.dora_axis],
    ids=str,
)
def test_a_core_without_a_kernel_is_a_matrix(case: Case) -> None:
    """No trainer writes one for a linear layer, but the axes allow it."""
    module, linear = make(case), make(replace(case, kernel=()))

    # The same values, because the sizes are the same.
    flat = module.with_tensors({n: t.reshape(linear.header[n]) for n, t in module.tensors.items()})
    assert torch.equal(
        change(replace(linear, tensors=flat.tensors)).flatten(),
        change(module).flatten(),
    )


# --- alpha ---------------------------------------------------------------------------------

#: Which slot's axis is the rank that alpha is divided by; algorithms that are not here have
#: no scale. LoKr takes the second factor's rank, else the first's.
RANK_AXES = {
    "lora": [("lora_down.weight", 0)],
    "dylora": [("lora_down.weight", 0)],
    "loha": [("hada_w1_b", 0)],
    "lokr": [("lokr_w2_b", 0), ("lokr_w1_b", 0)],
    "glora new": [("a2.weight", 0)],
    "glora old": [("a1.weight", 0)],
    "tlora": [("q_layer.weight", 0)],
}


def _rank(module: Module) -> int | None:
    name = module.case.algorithm.name
    axes = RANK_AXES.get(name) or RANK_AXES.get(f"{name} {module.case.layout.name}") or []
    return next((module.header[slot][axis] for slot, axis in axes if slot in module.tensors), None)


@each_case
def test_the_scale_is_alpha_over_the_rank(case: Case) -> None:
    module = make(case)
    dims = module.bound().dims
    rank = _rank(module)

    assert dims.rank == rank
    if rank is None or "alpha" not in module.tensors:
        assert dims.scale == 1
    else:
        squared = 2 if case.layout.name == "old" else 1  # GLoRA's old trainer applied it twice
        assert dims.scale == (1.5 / rank) ** squared


@pytest.mark.parametrize("case", [c for c in CASES if "alpha" in c.layout.names and c.optional], ids=str)
def test_a_missing_alpha_is_the_rank(case: Case) -> None:
    module = make(case)
    rank = _rank(module)
    if rank is None:
        expected = module.with_tensors({"alpha": torch.tensor(0.0)})  # no bound, or never read
    else:
        expected = module.with_tensors({"alpha": torch.tensor(float(rank))})

    assert torch.equal(change(module.without("alpha")), change(expected))


@pytest.mark.parametrize(
    "case", [c for c in CASES if "alpha" in c.layout.names and _rank(make(c)) is not None], ids=str
)
def test_alpha_zero_is_no_change_or_the_rank(case: Case) -> None:
    module = make(case)
    if not case.optional:
        module = module.with_tensors({"alpha": torch.tensor(1.5)})
    zero = module.with_tensors({"alpha": torch.tensor(0.0)})
    as_rank = change(zero, reading=Reading(alpha_zero="rank"))

    assert torch.equal(as_rank, change(module.without("alpha")))
    if case.dora_axis is None:
        assert not change(zero).any()
    else:  # DoRA renormalises an unchanged base
        assert not zero.bound().dims.scale


@pytest.mark.parametrize("case", [c for c in CASES if c.algorithm.name in ("lora", "dylora")], ids=str)
def test_lycoris_dylora_is_stronger_by_its_block_size(case: Case) -> None:
    module = make(case)
    plain = module.bound().dims.scale

    assert module.bound(reading=Reading(dylora_block_size=4)).dims.scale == 4 * plain


def test_glora_old_can_be_read_as_samplers_do() -> None:
    case = next(c for c in CASES if c.algorithm.name == "glora" and c.layout.name == "old")

    assert make(case).bound(reading=Reading(glora_old_scale="once")).dims.scale == 1.5 / 2


def test_alpha_beside_two_whole_lokr_factors_says_nothing() -> None:
    case = next(c for c in CASES if c.layout.name == "w1 full, w2 full")
    module = make(case)

    assert torch.equal(change(module), change(module.with_tensors({"alpha": torch.tensor(64.0)})))


# --- layers of another size ----------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    # A change of the bias alone is zero on any weight.
    [c for c in CASES if not c.optional and c.layout.name != "bias only"],
    ids=str,
)
def test_a_layer_with_one_row_more_is_refused(case: Case) -> None:
    module = make(case)
    # A vector on the input says nothing about the rows.
    shape = list(module.shape)
    shape[case.on_input] += 1
    base = torch.ones(shape, dtype=torch.float64)

    with pytest.raises(MismatchError):
        weight_change(module.detected, module.bound(), tuple(shape), base, strength=1.0)
