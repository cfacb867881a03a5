"""Frozen weights in 8 bits: held so, and rebuilt layer by layer where they are used.

A layer's weight becomes a property: what reads it, the layer itself, an adapter or a formula, gets
``stored · scale`` of each row in the dtype that is computed in, and the memory of that is free again
when the product is done. Autograd would keep it for the gradient; within :func:`rebuilt_for_gradients`
it keeps the layer instead, and the weight is rebuilt again when the gradient needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lycotool.linalg.quantised import rebuild_rows, round_rows

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

BaseDtype = Literal["fp8", "int8"]

_STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

#: The first and the last layer of a UNet stay as they are: small, and all of the image goes through them.
_LEFT = frozenset({"conv_in", "conv_out"})


class _EightBit:
    """A layer whose weight is rebuilt at each use."""

    stored: Tensor
    scale: Tensor
    computed_in: torch.dtype

    @property
    def weight(self) -> Tensor:
        """W as it is computed with."""
        weight = rebuild_rows(self.stored, self.scale, self.computed_in)
        weight.untyped_storage().eight_bit = self  # type: ignore[attr-defined] # how `_pack` knows it
        return weight


class EightBitLinear(_EightBit, nn.Linear):  # type: ignore[override]
    """A linear layer with its weight in 8 bits."""


class EightBitConv2d(_EightBit, nn.Conv2d):  # type: ignore[override]
    """A convolution with its weight in 8 bits."""


_CLASSES: dict[type, type] = {nn.Linear: EightBitLinear, nn.Conv2d: EightBitConv2d}


@dataclass(frozen=True, slots=True)
class Held:
    """What became of a network's weights.

    Attributes
    ----------
    layers
        How many are held in 8 bits.
    before, after
        Bytes of their weights.
    error
        ‖W - rebuilt‖ / ‖W‖ over all of them; None without numbers, on the meta device.
    """

    layers: int
    before: int
    after: int
    error: float | None

    def describe(self, name: str, kind: BaseDtype) -> str:
        """One sentence."""
        sizes = f"{self.after / 2**20:.0f} MiB instead of {self.before / 2**20:.0f}"
        lost = "" if self.error is None else f"; rounding changed them by {self.error:.2%} (root mean square)"
        return f"{name}: {self.layers} layers are held in {kind}, {sizes}{lost}"


@torch.no_grad()
def hold_in_eight_bits(network: nn.Module, kind: BaseDtype, device: torch.device) -> Held:
    """Round the weights of all linear layers and 2-D convolutions, and put the network on a device.

    One layer at a time, so the device never has the whole network as it was. Layers at the
    network's two ends, norms, biases and embeddings stay as they are. Formula and scales:
    :func:`lycotool.linalg.quantised.round_rows`.
    """
    layers = before = after = 0
    lost = torch.zeros((), dtype=torch.float64, device=device)
    whole = torch.zeros_like(lost)
    for name, module in network.named_modules():
        if type(module) not in _CLASSES or name in _LEFT:
            continue
        weight = module.weight.detach().to(device)
        stored, scale = round_rows(weight.float(), _STORED[kind])
        rebuilt = rebuild_rows(stored, scale, weight.dtype)
        lost += (rebuilt.float() - weight.float()).square().sum(dtype=torch.float64)
        whole += weight.float().square().sum(dtype=torch.float64)
        layers, before, after = layers + 1, before + weight.nbytes, after + stored.nbytes + scale.nbytes
        del module._parameters["weight"]
        module.register_buffer("stored", stored, persistent=False)
        module.register_buffer("scale", scale, persistent=False)
        module.computed_in = weight.dtype
        module.__class__ = _CLASSES[type(module)]
    network.to(device)
    network.has_eight_bit_layers = layers > 0  # type: ignore[assignment]
    has_numbers = device.type != "meta" and layers > 0
    error = float((lost / whole.clamp_min(1e-300)).sqrt()) if has_numbers else None
    return Held(layers, before, after, error)


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """A view of a layer's weight, without the numbers."""

    layer: _EightBit
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def rebuilt_for_gradients(network: nn.Module) -> AbstractContextManager[None]:
    """Keep no rebuilt weight for the gradient within; does nothing for a network without any."""
    return _packing() if getattr(network, "has_eight_bit_layers", False) else nullcontext()


@contextmanager
def _packing() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: Tensor) -> Any:  # noqa: ANN401 - what autograd holds
    layer = getattr(tensor.untyped_storage(), "eight_bit", None)
    if layer is None:
        return tensor
    return _Rebuilt(layer, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Any) -> Tensor:  # noqa: ANN401 - what autograd holds
    if isinstance(kept, _Rebuilt):
        return kept.layer.weight.as_strided(kept.size, kept.stride, kept.offset)
    found: Tensor = kept
    return found
