"""The product with ``W + ΔW``: its gradients, and what half precision keeps of a small change."""

from __future__ import annotations

import pytest
import torch
from makers.layers import CONVOLUTIONS, make_input, make_layer, relative_error, values, weight_of
from torch import Tensor

from lycotool.training.fused import _TwoProducts, product_with_sum
from lycotool.training.geometry import describe_layer


@pytest.mark.parametrize("name", ["linear", "linear without bias", *CONVOLUTIONS])
def test_gradients_are_those_of_one_product(name: str) -> None:
    layer, x = make_layer(name), make_input(name)
    described = describe_layer(layer)
    assert described is not None
    weight, bias = weight_of(layer), layer.bias
    change = values("change", tuple(weight.shape))

    def run(two: bool) -> list[Tensor]:
        inputs = x.clone().requires_grad_(True), change.clone().requires_grad_(True)
        if two:
            y = _TwoProducts.apply(*inputs, weight, bias, described)
        else:
            y = described.apply(inputs[0], weight + inputs[1], bias)
        return [y, *torch.autograd.grad(y, inputs, values("gradient", tuple(y.shape)))]

    for found, expected in zip(run(two=True), run(two=False), strict=True):
        assert relative_error(found, expected) < 1e-13  # float64 sums of at most 300 products


@pytest.mark.parametrize("name", ["linear", "conv 3x3", "layer norm", "group norm"])
def test_half_precision_keeps_a_small_change(name: str) -> None:
    """A change below half a unit of the weights' last place, which the sum would not have."""
    layer, x = make_layer(name, torch.bfloat16), make_input(name, torch.bfloat16)
    described = describe_layer(layer)
    assert described is not None
    weight = weight_of(layer)
    change = (weight.float() * 2**-11).detach()
    assert torch.equal((weight.float() + change).bfloat16(), weight)
    # An output of one sum only is rounded to bfloat16, so both are looked at one by one.
    calls: list[Tensor] = []
    original = type(described).apply

    def record(self: object, *args: Tensor) -> Tensor:
        calls.append(original(described, *args))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(described), "apply", record)
        product_with_sum(described, x, weight, change, None)
    assert len(calls) == 2
    # Both are rounded to 8 bits; the second is the first times a power of two.
    assert relative_error(calls[1] * 2**11, calls[0]) < 2**-7
