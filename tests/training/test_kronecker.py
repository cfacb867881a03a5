"""LoKr as a GPU computes it, by its whole ΔW or by thin factors, is LoKr by its formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from conformance.trained import Case, cases, gradients
from makers.layers import make_input, make_layer, relative_error, train_randomly, values
from torch import Tensor, nn

CASES = [
    case
    for case in cases()
    if case.algo == "lokr" and "groups" not in case.layer and "dora_wd" not in case.arguments
]


def _found(case: Case, layer: nn.Module, x: Tensor, *, on_gpu: bool, prepared: bool) -> dict[str, Tensor]:
    """The output and every gradient, of the input too."""
    network, adapter = case.build(layer, forward="structured" if on_gpu else "fused")
    adapter.as_on_gpu = on_gpu
    train_randomly(network)
    if not prepared:
        return gradients(layer, network, x)
    x = x.clone().requires_grad_()
    network.zero_grad()
    with network.prepared():
        y = layer(x)
        y.square().sum().backward()
    assert x.grad is not None
    return {"output": y, "input": x.grad, **{name: p.grad for name, p in adapter.trained()}}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # Sums of a few hundred float64 numbers in another order.
        assert relative_error(tensor, expected[name]) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
def test_output_and_gradients(case: Case, prepared: bool) -> None:
    _assert_equal(*(
        _found(case, make_layer(case.layer), make_input(case.layer), on_gpu=on_gpu, prepared=prepared)
        for on_gpu in (True, False)
    ))  # fmt: skip


#: What is trained, of which layer, and the operands a GPU gets.
WIDE: dict[str, tuple[dict[str, object], Callable[[], nn.Module], set[str]]] = {
    "thin linear": ({"dim": 2, "factor": 4}, partial(nn.Linear, 48, 64), {"up", "down", "mixing"}),
    "unequal factors": (
        {"dim": 2, "factor": 4, "unbalanced_factorization": True}, partial(nn.Linear, 96, 60), {"up", "down", "mixing"},
    ),
    "both thin": ({"dim": 1, "factor": 8, "decompose_both": True}, partial(nn.Linear, 64, 128), {"up", "down", "mixing"}),
    "thick linear": ({"dim": 5, "factor": 4}, partial(nn.Linear, 48, 64), {"first", "second"}),
    "many runs": ({"dim": 6, "factor": 16}, partial(nn.Linear, 256, 256), {"first", "second"}),
    "whole": ({"dim": 2, "factor": 4, "full_matrix": True}, partial(nn.Linear, 48, 64), {"first", "second"}),
    "thin convolution": ({"dim": 2, "factor": 4}, partial(nn.Conv2d, 32, 48, 3, padding=1), {"up", "down"}),
    "strided": ({"dim": 1, "factor": 2}, partial(nn.Conv2d, 48, 32, 3, stride=2), {"up", "down"}),
    "one element": ({"dim": 1, "factor": 4}, partial(nn.Conv2d, 32, 48, 1), {"up", "down"}),
    "thick convolution": ({"dim": 3, "factor": 8}, partial(nn.Conv2d, 64, 64, 1), {"first", "second"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("prepared", [False, True])
def test_wide_layers(name: str, prepared: bool) -> None:
    """Every form, each where it is the cheapest."""
    arguments, make, operands = WIDE[name]
    layer = make().double().requires_grad_(False)
    shape = (3, 7, 6) if isinstance(layer, nn.Conv2d) else (3, 5)
    width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    x = values("input", (shape[0], width, *shape[1:]) if len(shape) == 3 else (*shape, width))
    case = Case("lokr", name, {"alpha": 3.0, **arguments})
    _, adapter = case.build(make().double(), forward="structured")
    adapter.as_on_gpu = True
    assert set(adapter.operands()) == operands
    _assert_equal(*(_found(case, layer, x, on_gpu=on_gpu, prepared=prepared) for on_gpu in (True, False)))
