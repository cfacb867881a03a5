"""What the oracle tests share: reading weights back from a layer, and asking lycotool."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from makers.architectures import random_values
from torch import Tensor, nn

from lycotool.algorithms import SLOT_NAMES
from lycotool.algorithms.base import DEFAULT_READING, Bound, Reading
from lycotool.algorithms.detection import Detected, bias_change, detect, weight_change
from lycotool.formats.keys import parse_keys
from lycotool.ops._adapter import AdapterInput
from lycotool.ops.bake import BakeOptions, BakeResult
from lycotool.ops.bake import bake as run_bake

EPS32 = torch.finfo(torch.float32).eps

Forward = Callable[[Tensor], Tensor]
StateDict = Mapping[str, Tensor]


# --- a layer's weight, read from what it does to its input ---------------------------------


def effective(forward: Forward, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the affine map ``forward``, which has the geometry of ``layer``.

    A unit vector picks one column of a linear layer and a unit impulse one tap of a
    convolution; every other product is exactly 0, so reading back adds no rounding.
    """
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            bias = forward(torch.zeros(1, layer.in_features))[0]
            return (forward(torch.eye(layer.in_features)) - bias).T, bias
        return _effective_convolution(forward, layer)


def _effective_convolution(forward: Forward, conv: nn.Module) -> tuple[Tensor, Tensor]:
    taps = list(product(*(range(size) for size in conv.kernel_size)))
    # The first output whose window lies wholly behind the padding, and where it starts.
    output = [math.ceil(p / s) for p, s in zip(conv.padding, conv.stride, strict=True)]
    start = [t * s - p for t, s, p in zip(output, conv.stride, conv.padding, strict=True)]
    extent = [o + d * (k - 1) + 1 for o, d, k in zip(start, conv.dilation, conv.kernel_size, strict=True)]
    impulses = torch.zeros(conv.in_channels, len(taps), conv.in_channels, *extent)
    for channel in range(conv.in_channels):
        for index, tap in enumerate(taps):
            place = [o + d * j for o, d, j in zip(start, conv.dilation, tap, strict=True)]
            impulses[(channel, index, channel, *place)] = 1
    at = (slice(None), slice(None), *output)
    bias = forward(torch.zeros(1, conv.in_channels, *extent))[at][0]
    columns = forward(impulses.flatten(0, 1))[at] - bias
    # Rows of one group see the input channels of that group only.
    groups = conv.groups
    blocks = columns.reshape(groups, -1, len(taps), groups, conv.out_channels // groups)
    weight = torch.diagonal(blocks, dim1=0, dim2=3).permute(3, 2, 0, 1)
    return weight.reshape(conv.out_channels, -1, *conv.kernel_size), bias


def effective_norm(forward: Forward, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a normalisation, from an input that normalises to ±1."""
    channels = norm.weight.shape[0]
    # Alternating signs have mean 0 and variance 1, also within every group of channels.
    x = torch.ones(1, channels)
    x[:, 1::2] = -1
    with torch.no_grad():
        up, down = forward(x)[0], forward(-x)[0]
    normed = x[0] / math.sqrt(1 + norm.eps)
    return (up - down) / (2 * normed), (up + down) / 2


# --- random values -------------------------------------------------------------------------


@torch.no_grad()
def randomise(module: nn.Module, seed: int, std: float, *, marks: Sequence[str] = ("",)) -> None:
    """Give parameters random values: at initialisation adapters change nothing.

    Only those with one of ``marks`` in their name. Values lie on bfloat16's grid, inside
    float16's range, so that saving in either format loses nothing and the module in memory
    is what the file says.
    """
    for name, parameter in module.named_parameters():
        if not any(mark in name for mark in marks):
            continue
        values = random_values(name, tuple(parameter.shape), std, seed)
        if "dora_scale" in name or "magnitude" in name:
            values = parameter * (1 + values.clamp(-0.8, 0.8))  # a norm stays positive
        elif "rescale" in name:
            values = 1 + values
        parameter.copy_(values.half().bfloat16())


@torch.no_grad()
def randomise_base(module: nn.Module, seed: int, std: float = 0.5) -> None:
    """Give the weights and biases of base layers random values."""
    for name, parameter in module.named_parameters():
        parameter.copy_(random_values(name, tuple(parameter.shape), std, seed))


# --- lycotool ------------------------------------------------------------------------------


def evaluate(
    state: StateDict,
    base: Tensor,
    *,
    strength: float = 1.0,
    reading: Reading = DEFAULT_READING,
) -> tuple[Tensor, Tensor | None, Detected]:
    """The change of weight and bias that lycotool reads from one module's saved tensors."""
    keys = parse_keys(state, SLOT_NAMES)
    assert not keys.unknown
    assert not keys.orphans
    (module,) = keys.modules.values()
    tensors = {slot: state[key].detach() for slot, key in module.slots.items()}
    detected = detect({slot: tuple(tensor.shape) for slot, tensor in tensors.items()})
    alpha = float(tensors.pop("alpha")) if "alpha" in tensors else None
    dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, reading)
    tensors = {slot: t.to(base.dtype) if t.is_floating_point() else t for slot, t in tensors.items()}
    bound = Bound(tensors, detected.layout, detected.sizes, dims, reading)
    weight = weight_change(detected, bound, tuple(base.shape), base, strength=strength)
    return weight, bias_change(detected, bound, strength=strength), detected


def bake(
    checkpoint: Path, adapters: Path | Mapping[Path, float], output: Path, *, strength: float = 1.0
) -> BakeResult:
    """Run `bake` on the CPU; a warning or an unmatched module is an error."""
    weighted = {adapters: strength} if isinstance(adapters, Path) else adapters
    options = BakeOptions(output=str(output), device="cpu", strict=True)
    return run_bake(str(checkpoint), [AdapterInput(str(path), s) for path, s in weighted.items()], options)


# --- comparing -----------------------------------------------------------------------------


def assert_near(found: Tensor, expected: Tensor, roundings: float, *, eps: float = EPS32) -> None:
    """Compare with ``roundings`` units of the last place of the largest expected element."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max().item()
    unit = eps * expected.double().abs().max().item()
    assert error <= roundings * unit, f"off by {error}, allowed {roundings * unit}"


def half_steps(found: Tensor, expected: Tensor) -> Tensor:
    """How many float16 numbers apart the elements are."""

    def position(values: Tensor) -> Tensor:
        # The bits of a sign and magnitude, as one increasing scale.
        bits = values.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (position(found) - position(expected)).abs()
