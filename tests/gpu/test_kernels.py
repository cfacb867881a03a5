"""The Triton kernels against the same formulas in float64.

Where Triton is installed and there is no GPU, its interpreter runs them, slowly:
``TRITON_INTERPRET=1 pytest tests/gpu/test_kernels.py``. It truncates to bf16 instead of rounding, so that
is left out there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from makers.layers import build, make_input, make_layer, relative_error, train_randomly
from torch import Tensor

#: Triton reads the variable when it is imported.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

#: One rounding of the result, half an eps. Inside all is float32: images four deviations from zero lose four
#: eps to the subtraction of the mean, which weights of up to four multiply; and exponentials of a few eps.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-18}

if DEVICE == "cpu":
    del TOLERANCE[torch.bfloat16]

#: Half of float16's smallest step.
SMALLEST = 2.0**-25


def both(function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare outputs and the gradient of the input."""
    x = x.detach().requires_grad_()
    reference = x.detach().double().requires_grad_()
    y, expected = function(x), exact(reference)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(gradient)
    expected.backward(gradient.double())
    assert x.grad is not None
    assert reference.grad is not None
    for found, wanted in ((y, expected), (x.grad, reference.grad)):
        assert found.dtype == x.dtype
        error = (found.double() - wanted).abs()
        assert bool((error <= TOLERANCE[x.dtype] * (wanted.abs() + wanted.square().mean().sqrt())).all())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 320, 64, 64), 32), ((1, 640, 13, 19), 32), ((3, 2560, 8, 8), 32), ((2, 8, 3, 5), 2), ((1, 1280, 1, 1), 32)],
    ids=str,
)  # fmt: skip
def test_group_norm(shape: tuple[int, ...], groups: int, silu: bool, dtype: torch.dtype) -> None:
    """Also where the mean is far from zero, and for images that are not channels last."""
    from lycotool.training.kernels.group_norm import group_norm

    generator = torch.Generator().manual_seed(0)
    x = (4 + torch.randn(shape, generator=generator)).to(DEVICE).to(dtype)
    weight, bias = (torch.randn(shape[1], generator=generator).to(DEVICE).to(dtype) for _ in range(2))

    def exact(x: Tensor) -> Tensor:
        y = torch.nn.functional.group_norm(x, groups, weight.double(), bias.double(), 1e-5)
        return torch.nn.functional.silu(y) if silu else y

    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        both(lambda x: group_norm(x, groups, weight, bias, 1e-5, silu=silu), exact, images)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(2, 77, 2560), (1, 3, 10), (5, 2)], ids=str)
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from lycotool.training.kernels.geglu import geglu

    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).to(dtype)

    def exact(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * torch.nn.functional.gelu(b)

    both(geglu, exact, x)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(8192, 640), (77, 100), (1, 3)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_scaled_columns(shape: tuple[int, int], has_bias: bool, dtype: torch.dtype) -> None:
    from lycotool.training.kernels.columns import scale, scaled_backward

    generator = torch.Generator().manual_seed(0)
    dy, y = (torch.randn(shape, generator=generator).to(DEVICE).to(dtype) for _ in range(2))
    gain, bias = (torch.randn(shape[1], generator=generator).to(DEVICE).to(dtype) for _ in range(2))
    gain[0] = -1.0  # a channel that is switched off
    given = bias if has_bias else None
    z, factor = y.clone(), 1 + gain.double()
    scale(z, gain, given)
    expected = factor * y.double() + (bias.double() if has_bias else 0.0)
    # Float32 inside rounds the product, which the sum may be much less than.
    bound = TOLERANCE[dtype] * expected.abs() + 2.0**-23 * (factor * y.double()).abs() + SMALLEST
    assert bool(((z.double() - expected).abs() <= bound).all())
    dz, d_gain = scaled_backward(dy, y, gain, given)
    exact = dy.double() * factor
    assert bool(((dz.double() - exact).abs() <= TOLERANCE[dtype] * exact.abs() + SMALLEST).all())
    products = dy.double() * (y.double() - bias.double() if has_bias else y.double())
    divisor = torch.where(factor == 0, 1, factor)
    quotient = products.sum(0) / divisor
    # float32 sums of so many products, in tiles: the rounding of each, at most all one way. Then one of the result.
    bound = 2.0**-22 * products.abs().sum(0) / divisor.abs() + TOLERANCE[dtype] * quotient.abs() + SMALLEST
    assert bool(((d_gain.double() - quotient).abs() <= bound).all())


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv 3x3", "conv 3x3 stride 2"])
def test_a_dora_layer(name: str) -> None:
    """By the kernels and without them; convolutions with the memory of their channels last, as on a GPU."""
    found = []
    for kernels in (True, False):
        layer = make_layer(name, torch.float32).to(DEVICE)
        network, adapter = build(layer, {"algo": "lora", "dim": 4, "dora_wd": True}, dtype=torch.float32)
        adapter.uses_kernels = kernels
        train_randomly(network)
        x = make_input(name, torch.float32).to(DEVICE)
        if x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append({"y": y, "x": x.grad, **{slot: value.grad for slot, value in adapter.trained()}})
    for slot, tensor in found[0].items():
        # A few hundred float32 numbers, added in another order.
        assert relative_error(tensor, found[1][slot]) < 1e-5, slot
