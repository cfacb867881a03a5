"""Operands made for all equal layers at once are those that each layer makes by itself."""

from __future__ import annotations

import pytest
import torch
from conformance.trained import Case, cases
from makers.layers import make_input, make_layer, make_target, relative_error, train_randomly
from torch import Tensor, nn

from lycotool.training.network import Network
from lycotool.training.network_options import NetworkOptions

CASES = [case for case in cases() if case.layer in ("linear", "conv 3x3", "layer norm")]

#: Sums of a few hundred float64 numbers in another order.
EXACT = 1e-12


def network_on(case: Case, layers: list[nn.Module], **more: object) -> Network:
    """One adapter on each layer, every parameter away from its start and from the others'."""
    arguments = {"algo": "full" if case.algo == "norm" else case.algo, **case.arguments, **more}
    options = NetworkOptions().with_arguments(f"{key}={value}" for key, value in arguments.items())
    targets = [make_target(layer, f"lora_unet_{number}") for number, layer in enumerate(layers)]
    network = Network.build(targets, options, seed=0, dtype=torch.float64)
    train_randomly(network)
    network.draw(0)
    return network


@pytest.mark.parametrize("form", ["structured", "fused"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_once_or_by_itself(case: Case, form: str) -> None:
    layers = [make_layer(case.layer) for _ in range(3)]
    network = network_on(case, layers, forward=form)
    x = make_input(case.layer)
    weights = [torch.linspace(-1, number + 2, layers[0](x).numel()).double().cos() for number in range(3)]

    def gradients() -> tuple[list[Tensor], list[Tensor]]:
        outputs = [layer(x) for layer in layers]
        torch.autograd.backward([(y.flatten() * w).sum() for y, w in zip(outputs, weights, strict=True)])
        return [y.detach() for y in outputs], [p.grad for p in network.parameters() if p.grad is not None]

    expected = gradients()
    for parameter in network.parameters():
        parameter.grad = None
    with network.prepared():
        found_outputs = [layer(x) for layer in layers]
        torch.autograd.backward(
            [(y.flatten() * w).sum() for y, w in zip(found_outputs, weights, strict=True)]
        )
    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(found) == len(expected[1]) == len(list(network.parameters()))
    for one, other in zip([*found_outputs, *found], [*expected[0], *expected[1]], strict=True):
        assert relative_error(one, other) < EXACT


def test_gradients_are_added_and_nothing_stays() -> None:
    case = next(case for case in CASES if str(case).startswith("lora-linear"))
    layers = [make_layer("linear"), make_layer("linear")]
    network = network_on(case, layers)
    x = make_input("linear")
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad for parameter in network.parameters()]
    with network.prepared():
        layers[0](x).sum().backward()
    after = [parameter.grad for parameter in network.parameters()]
    assert all(one is other for one, other in zip(before, after, strict=True))  # where they were
    used, idle = after[:2], after[2:]
    assert all(grad is not None and not torch.equal(grad, torch.ones_like(grad)) for grad in used)
    assert all(grad is not None and torch.equal(grad, torch.ones_like(grad)) for grad in idle)
    assert all(adapter.prepared is None for adapter in network.adapters)


def test_an_error_leaves_no_operands() -> None:
    case = next(case for case in CASES if str(case).startswith("lora-linear"))
    network = network_on(case, [make_layer("linear")])
    with pytest.raises(ZeroDivisionError), network.prepared():
        raise ZeroDivisionError
    assert all(adapter.prepared is None for adapter in network.adapters)


@pytest.mark.parametrize("drops", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}, {"dropout": 0.5}])
def test_dropouts_are_at_work(drops: dict[str, float]) -> None:
    case = next(case for case in CASES if str(case).startswith("lora-linear"))
    layers = [make_layer("linear"), make_layer("linear")]
    network = network_on(case, layers, **drops)
    x = make_input("linear")
    seen = set()
    for number in range(8):
        network.draw(number)
        with network.prepared():
            prepared = [layer(x).detach() for layer in layers]
        alone = [layer(x).detach() for layer in layers]
        for one, other in zip(prepared, alone, strict=True):
            assert relative_error(one, other) < EXACT
        seen.add(float(prepared[0].sum()))
    assert len(seen) > 1
