"""LoKr by its whole ΔW, as a GPU computes it, is LoKr by its formula."""

from __future__ import annotations

import pytest
from conformance.trained import Case, cases, gradients
from makers.layers import make_input, make_layer, relative_error, train_randomly

CASES = [
    case
    for case in cases()
    if case.algo == "lokr" and "groups" not in case.layer and "dora_wd" not in case.arguments
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
def test_output_and_gradients(case: Case, prepared: bool) -> None:
    found = []
    for builds in (True, False):
        layer = make_layer(case.layer)
        network, adapter = case.build(layer, forward="structured" if builds else "fused")
        adapter.builds_kronecker = builds
        train_randomly(network)
        if prepared:
            network.zero_grad()
            with network.prepared():
                y = layer(make_input(case.layer))
                y.square().sum().backward()
            found.append({"output": y, **{name: p.grad for name, p in adapter.trained()}})
        else:
            found.append(gradients(layer, network, make_input(case.layer)))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        # Sums of a few hundred float64 numbers in another order.
        assert relative_error(tensor, found[1][name]) < 1e-12
