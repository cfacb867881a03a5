"""Layers to train an adapter on, with random float64 weights, and what to put on them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lycotool.algorithms.training import Training
from lycotool.training.adapter import AdapterLayer
from lycotool.training.geometry import describe_layer
from lycotool.training.network import Network
from lycotool.training.network_options import NetworkOptions, trainable
from lycotool.training.targets import Target

NAME = "lora_unet_layer"

LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": partial(nn.Linear, 12, 16),
    "linear without bias": partial(nn.Linear, 24, 12, bias=False),
    "conv 1x1": partial(nn.Conv2d, 12, 16, 1),
    "conv 3x3": partial(nn.Conv2d, 12, 16, 3, padding=1),
    "conv 3x3 stride 2": partial(nn.Conv2d, 12, 16, 3, stride=2, padding=1),
    "conv 3x1 dilation 2": partial(nn.Conv2d, 8, 12, (3, 1), dilation=2, padding=(2, 0), bias=False),
    "conv 3x3 groups 2": partial(nn.Conv2d, 16, 16, 3, padding=1, groups=2),
    "conv1d": partial(nn.Conv1d, 12, 16, 3, padding=1),
    "conv3d": partial(nn.Conv3d, 6, 8, (2, 3, 1), padding=(1, 1, 0)),
    "layer norm": partial(nn.LayerNorm, 16),
    "group norm": partial(nn.GroupNorm, 4, 16),
}
CONVOLUTIONS = tuple(name for name in LAYERS if name.startswith("conv"))
NORMS = ("layer norm", "group norm")


def make_target(
    module: nn.Module,
    name: str = NAME,
    component: str = "unet",
    overrides: Mapping[str, object] | None = None,
) -> Target:
    """A layer as `Network.build` wants it."""
    described = describe_layer(module)
    assert described is not None
    return Target(component, "layer", name, module, described.kind, overrides or {})


def values(name: str, shape: tuple[int, ...], std: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values that depend on the name and shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer of :data:`LAYERS`, frozen."""
    layer = LAYERS[name]().to(dtype).requires_grad_(False)
    for part, parameter in layer.named_parameters():
        parameter.copy_(values(f"{name} {part}", tuple(parameter.shape), 0.5, dtype))
    return layer


def make_input(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of two for such a layer."""
    layer = LAYERS[name]()
    if isinstance(layer, nn.Linear | nn.LayerNorm):
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.normalized_shape[0]
        return values("input", (2, 5, width), 1.0, dtype)
    if isinstance(layer, nn.GroupNorm):
        return values("input", (2, layer.num_channels, 3, 3), 1.0, dtype)
    size = (5, 6, 4)[: len(layer.kernel_size)]
    return values("input", (2, layer.in_channels, *size), 1.0, dtype)


def build(
    layer: nn.Module,
    arguments: Mapping[str, object],
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Network, AdapterLayer]:
    """An adapter on one layer, with arguments given as users give them."""
    options = NetworkOptions().with_arguments(f"{key}={value}" for key, value in arguments.items())
    network = Network.build([make_target(layer)], options, seed=seed, dtype=dtype)
    (adapter,) = network.adapters
    return network, adapter


@torch.no_grad()
def train_randomly(network: Network, std: float = 0.3) -> None:
    """Move every parameter away from its start, as training would."""
    for name, parameter in network.raw_state().items():
        move = values(name, tuple(parameter.shape), std, parameter.dtype).to(parameter.device)
        # Norms and scales stay positive.
        is_gain = name.endswith(("dora_scale", "rescale"))
        parameter.add_(parameter * move.clamp(-0.8, 0.8) if is_gain else move)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight, which every layer here has."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def training_of(algo: str) -> Training:
    """How the registry trains an algorithm."""
    return trainable(algo)[1]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected element."""
    assert found.shape == expected.shape
    largest = float(expected.detach().abs().max())
    difference = float((found - expected).detach().abs().max())
    assert math.isfinite(difference)
    return difference / largest if largest else difference
