"""A training step of every algorithm captured in a CUDA graph gives what the eager step gives."""

from __future__ import annotations

import pytest
import torch
from conformance.trained import Case, cases
from makers.layers import make_input, make_layer, relative_error, train_randomly

pytestmark = pytest.mark.gpu

CASES = [case for case in cases() if case.layer in ("linear", "conv 3x3", "layer norm", "group norm")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", ["auto", "structured", "fused"])
def test_a_captured_step_is_the_eager_step(case: Case, form: str) -> None:
    """With dropouts, whose masks change between replays while the graph stays."""
    layer = make_layer(case.layer, torch.float32).cuda()
    network, _ = case.build(
        layer, torch.float32, forward=form, dropout=0.1, rank_dropout=0.2, module_dropout=0.1
    )
    train_randomly(network)
    x = make_input(case.layer, torch.float32).cuda()
    parameters = list(network.parameters())

    def step() -> list[torch.Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]

    network.draw(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (1, 2):
        network.draw(number)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            # The same kernels in the same order, but for sums that the library may split otherwise.
            largest = float(expected.abs().max())
            assert float((found - expected).abs().max()) <= 1e-5 * max(largest, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_form_a_gpu_chooses_is_the_formula(case: Case) -> None:
    """Output and every gradient, in float64, beside ΔW built by the registry's formula on the CPU."""
    found = []
    for device, form in (("cpu", "fused"), ("cuda", "auto")):
        layer = make_layer(case.layer).to(device)
        network, _ = case.build(layer, forward=form)
        train_randomly(network)
        network.draw(0)
        x = make_input(case.layer).to(device).requires_grad_()
        with network.prepared():
            y = layer(x)
            weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).cos().to(device)
            (y.flatten() * weights).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        found.append([tensor.detach().cpu() for tensor in (y, x.grad, *gradients) if tensor is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        # Sums of a few hundred float64 numbers in another order.
        assert relative_error(one, other) < 1e-10
