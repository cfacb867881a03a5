"""What every trained algorithm must do, whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.trained import Case, cases, gradients, merged, read_back, size_of_change
from makers.layers import make_input, make_layer, relative_error, train_randomly, weight_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lycotool.algorithms import ALGORITHMS
from lycotool.algorithms.training import COMMON_ARGUMENTS, Training, Untrainable
from lycotool.training.network_options import OPTIONS

CASES = cases()
each_case = pytest.mark.parametrize("case", CASES, ids=str)

#: Two orders of the same float64 sums and their gradients, of at most some 200 terms, over
#: factors below 10; measured: at most 1e-14.
EXACT = 1e-10


def test_every_algorithm_says_how_it_is_trained() -> None:
    for algorithm in ALGORITHMS:
        if isinstance(algorithm.training, Untrainable):
            assert algorithm.training.reason
            continue
        assert algorithm.training.arguments <= OPTIONS.keys() - COMMON_ARGUMENTS
        assert set(algorithm.training.layouts) <= set(algorithm.layouts)
        slots = {slot.name for layout in algorithm.training.layouts for slot in layout.slots}
        named = algorithm.training.up | algorithm.training.optional
        axes = algorithm.training.rank_axes + algorithm.training.nested_axes
        assert named | {slot for slot, _ in axes} <= slots


def test_every_layout_that_can_be_trained_is_tested() -> None:
    found = {(case.algo, case.build(make_layer(case.layer))[1].detected.layout.name) for case in CASES}
    declared = {
        (algorithm.name, layout.name)
        for algorithm in ALGORITHMS
        if isinstance(algorithm.training, Training)
        for layout in algorithm.training.layouts
    }
    # Only an unbalanced split makes LoKr's first factor the larger one; test_weights.py has it.
    assert declared - found == {("lokr", "w1 product, w2 full"), ("lokr", "w1 product, cp")}
    assert found <= declared


@each_case
@pytest.mark.parametrize("form", ["structured", "fused"])
def test_training_starts_at_the_layer_itself(case: Case, form: str) -> None:
    layer, x = make_layer(case.layer), make_input(case.layer)
    before = layer(x)
    network, adapter = case.build(layer, forward=form)
    network.draw(0)

    multiplies = adapter.structured is not None and adapter.structured.output is not None
    is_exact = not multiplies and adapter.detected.dora_slot is None
    if is_exact:
        assert torch.equal(layer(x), before)
    else:  # the bias is added last; with DoRA there is a product with 1, or nearly 1, too
        assert relative_error(layer(x), before) < 8 * torch.finfo(torch.float64).eps


@each_case
def test_structured_and_fused_are_the_same(case: Case) -> None:
    x = make_input(case.layer)
    found: list[dict[str, Tensor]] = []
    for form in ("structured", "fused"):
        layer = make_layer(case.layer)
        network, adapter = case.build(layer, forward=form)
        train_randomly(network)
        network.draw(3)
        found.append(gradients(layer, network, x))
        assert form == "structured" or adapter.structured is None
    for name, expected in found[1].items():
        assert relative_error(found[0][name], expected) < EXACT, name


@each_case
def test_every_parameter_matters(case: Case) -> None:
    """Guards the comparison above: gradients of zero are equal."""
    layer = make_layer(case.layer)
    network, adapter = case.build(layer)
    network.eval()
    train_randomly(network)

    for name, gradient in gradients(layer, network, make_input(case.layer)).items():
        assert gradient.any(), name
    base = weight_of(layer)
    assert size_of_change(adapter.weight_change(), base) > 0.01


@each_case
def test_the_file_is_what_was_trained(case: Case) -> None:
    """Exported, detected, merged: the plain layer then does what the trained one does."""
    layer, x = make_layer(case.layer), make_input(case.layer)
    network, adapter = case.build(layer)
    network.eval()
    train_randomly(network)

    saved = read_back(network.export(), weight_of(layer), case.algo)

    assert saved.label == adapter.detected.label
    assert relative_error(saved.weight, adapter.weight_change()) < EXACT
    assert relative_error(merged(case, saved)(x), layer(x)) < EXACT


@each_case
def test_the_raw_state_is_bit_exact(case: Case) -> None:
    layer, other = make_layer(case.layer), make_layer(case.layer)
    network, _ = case.build(layer, torch.float32)
    train_randomly(network)
    state = {key: tensor.clone() for key, tensor in network.raw_state().items()}
    resumed, _ = case.build(other, torch.float32)
    resumed.load_raw_state(state)

    assert resumed.raw_state().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in resumed.raw_state().items())
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


# --- precision -----------------------------------------------------------------------------


@each_case
def test_a_small_change_survives_a_bfloat16_base(case: Case) -> None:
    """``bf16(W + ΔW) - W`` would lose most of it: bfloat16 has 8 bits."""
    layer, exact = make_layer(case.layer, torch.bfloat16), make_layer(case.layer)
    exact.load_state_dict(layer.state_dict())
    (network, adapter), (reference, other) = case.build(layer, torch.float32), case.build(exact)
    for net in (network.eval(), reference.eval()):
        train_randomly(net, 1e-3)
    reference.load_raw_state(network.raw_state())
    change, expected = adapter.weight_change(), other.weight_change()
    x = make_input(case.layer, torch.bfloat16)

    relative = size_of_change(expected, weight_of(exact))
    assert relative < 0.02
    # DoRA subtracts W in float32: what the change is smaller by is lost of 24 bits, not of 8.
    lost = 1 / relative if adapter.detected.dora_slot else 1.0
    assert relative_error(change.double(), expected) < 200 * torch.finfo(torch.float32).eps * lost
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    if not adapter.detected.needs_base:
        for form in (adapter.structured, None):
            adapter.structured = form
            # Inputs, factors and the result are rounded to 8 bits, the change is not lost in W.
            assert relative_error(adapter.change(x).double(), other.change(x.double())) < 4 * 2**-8


@pytest.mark.parametrize("case", [c for c in CASES if c.layer in ("linear", "conv 3x3")], ids=str)
@pytest.mark.parametrize("form", ["structured", "fused"])
def test_half_precision_inputs_give_half_precision_outputs(case: Case, form: str) -> None:
    layer = make_layer(case.layer, torch.bfloat16)
    network, _ = case.build(layer, torch.float32, forward=form)
    train_randomly(network.eval(), 0.1)
    x = make_input(case.layer, torch.bfloat16)
    y = layer(x)
    exact = make_layer(case.layer)
    exact.load_state_dict(layer.state_dict())
    reference, _ = case.build(exact)
    reference.eval().load_raw_state(network.raw_state())

    assert y.dtype == torch.bfloat16
    # A few roundings of inputs, factors and outputs, each half a unit of 2^-8.
    assert relative_error(y.double(), exact(x.double())) < 4 * 2**-8


# --- a step can be captured ----------------------------------------------------------------


class _Waits(TorchDispatchMode):
    """Raises where Python asks for the value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        waiting = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")
        assert not name.startswith(waiting), f"{name} waits for a value"
        return func(*args, **(kwargs or {}))


@each_case
@pytest.mark.parametrize("form", ["structured", "fused"])
def test_a_step_waits_for_no_value(case: Case, form: str) -> None:
    layer, x = make_layer(case.layer), make_input(case.layer)
    network, _ = case.build(
        layer, forward=form, dropout=0.1, rank_dropout=0.2, rank_dropout_scale=True, module_dropout=0.1
    )
    network.draw(0)
    with _Waits():
        layer(x).sum().backward()


def test_the_check_above_can_fail() -> None:
    with pytest.raises(AssertionError, match="waits"), _Waits():
        bool(torch.ones(()) > 0)


#: One of each algorithm, and what has steps of its own.
TRACED = [
    *{case.algo: case for case in reversed(CASES) if case.layer in ("linear", "layer norm")}.values(),
    *(
        c
        for c in CASES
        if str(c).startswith(("lora-linear", "boft-linear"))
        and {"dora_wd", "constraint"} & c.arguments.keys()
    ),
]


@pytest.mark.parametrize("case", TRACED, ids=str)
def test_a_layer_is_one_graph(case: Case) -> None:
    """Also with dropouts: `fullgraph` refuses a graph with breaks."""
    layer, x = make_layer(case.layer), make_input(case.layer)
    network, _ = case.build(layer, forward="structured", dropout=0.1, rank_dropout=0.2, module_dropout=0.1)
    train_randomly(network)
    network.draw(0)
    torch._dynamo.reset()

    traced = torch.compile(layer, backend="eager", fullgraph=True)(x)

    assert relative_error(traced, layer(x)) < EXACT
