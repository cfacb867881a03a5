"""What training is tested with, from what the registry says: every algorithm, every argument.

A newly registered algorithm with a :class:`Training` gets its cases from here without a line
of its own, on every kind of layer it trains, with every argument it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from makers.layers import CONVOLUTIONS, LAYERS, NORMS, build, make_layer
from torch import Tensor, nn

from lycotool.algorithms import ALGORITHMS
from lycotool.algorithms.base import DEFAULT_READING, Bound
from lycotool.algorithms.detection import bias_change, detect, weight_change
from lycotool.algorithms.training import Training
from lycotool.training.adapter import AdapterLayer
from lycotool.training.network import Network

#: A value for each argument that only some algorithms take; sizes suit :data:`LAYERS`.
VALUES: Mapping[str, object] = {
    "rs_lora": True, "use_conv_cp": True, "use_scalar": True, "factor": 2, "decompose_both": True,
    "full_matrix": True, "unbalanced_factorization": True, "block_size": 2, "constraint": 0.02,
    "rescaled": True, "train_on_input": True,
}  # fmt: skip

LINEAR = ("linear", "linear without bias")


@dataclass(frozen=True)
class Case:
    """An algorithm with arguments on a layer."""

    algo: str
    layer: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(
            [self.algo, self.layer.replace(" ", "_"), *(f"{k}={v}" for k, v in self.arguments.items())]
        )

    def build(
        self, layer: nn.Module, dtype: torch.dtype = torch.float64, **more: object
    ) -> tuple[Network, AdapterLayer]:
        """The adapter on a layer; norms come by themselves."""
        algo = "full" if self.algo == "norm" else self.algo
        return build(layer, {"algo": algo, **self.arguments, **more}, dtype=dtype)


def cases() -> list[Case]:
    """Every algorithm on every layer, and each argument on one layer of each kind."""
    return [case for algorithm in ALGORITHMS for case in _cases_of(algorithm.name, algorithm.training)]


def _cases_of(algo: str, training: object) -> Iterator[Case]:
    if not isinstance(training, Training):
        return
    takes = training.arguments
    size: dict[str, object] = {}
    if "dim" in takes:
        size["dim"] = 4
    if "alpha" in takes:
        size["alpha"] = 2.5
    if algo == "loha":
        size["dim"] = 2
    if algo == "lokr":
        size["dim"] = 1
    layers = {"linear": LINEAR, "conv": CONVOLUTIONS, "norm": NORMS}
    for kind in sorted(training.kinds):
        for layer in layers[kind]:
            # 12 rows have no butterfly with blocks of 4.
            is_odd = algo == "boft" and LAYERS[layer]().weight.shape[0] == 12
            yield Case(algo, layer, {**size, "dim": 6} if is_odd else size)
        for layer in {"linear": ("linear",), "conv": ("conv 3x3", "conv 1x1"), "norm": ()}[kind]:
            for name in sorted(takes & VALUES.keys()):
                yield Case(algo, layer, {**size, name: VALUES[name]})
            if "dora_wd" in takes:
                for on_output in (True, False):
                    yield Case(algo, layer, {**size, "dora_wd": True, "wd_on_output": on_output})
    if {"use_conv_cp", "dora_wd"} <= takes:
        yield Case(algo, "conv 3x3", {**size, "use_conv_cp": True, "dora_wd": True})


@dataclass(frozen=True)
class Saved:
    """What the registry reads from an exported file: the changes of weight and bias."""

    label: str
    weight: Tensor
    bias: Tensor | None


def read_back(tensors: Mapping[str, Tensor], base: Tensor, hint: str | None = None) -> Saved:
    """Detect the one module of a file and compute its change as every command does."""
    slots = {key.partition(".")[2]: tensor for key, tensor in tensors.items()}
    detected = detect({slot: tuple(t.shape) for slot, t in slots.items()}, algorithm_hint=hint)
    alpha = float(slots.pop("alpha")) if "alpha" in slots else None
    dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, DEFAULT_READING)
    bound = Bound(
        {slot: t.to(base.dtype) if t.is_floating_point() else t for slot, t in slots.items()},
        detected.layout, detected.sizes, dims,
    )  # fmt: skip
    weight = weight_change(detected, bound, tuple(base.shape), base, strength=1.0)
    return Saved(detected.label, weight, bias_change(detected, bound, strength=1.0))


def merged(case: Case, saved: Saved) -> nn.Module:
    """The layer with the file's change folded in."""
    layer = make_layer(case.layer)
    with torch.no_grad():
        layer.weight.add_(saved.weight)
        if saved.bias is not None:
            layer.bias.add_(saved.bias)
    return layer


def gradients(layer: nn.Module, network: Network, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and every parameter."""
    x = x.detach().clone().requires_grad_(True)
    network.zero_grad()
    y = layer(x)
    # Weights that no sum of outputs cancels.
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).cos())
    assert x.grad is not None
    found = {"output": y.detach(), "input": x.grad}
    for name, _, adapter in network.named():
        for slot, parameter in adapter.trained():
            assert parameter.grad is not None, f"{name}.{slot}"
            found[slot] = parameter.grad.clone()
    return found


def size_of_change(change: Tensor, base: Tensor) -> float:
    """``‖ΔW‖ / ‖W‖``."""
    return math.sqrt(float(change.detach().square().sum() / base.square().sum()))
