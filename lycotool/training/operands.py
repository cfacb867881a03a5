"""What the layers' structured forms compute with, made for all equal layers in one go.

An algorithm's operands are small tensors: factors with a scale folded in, products of factors,
rotations. Layer by layer they cost more kernels than the layer itself. Layers of one geometry
and algorithm are alike, so their slots are stacked, the formula runs once over the stack
(`torch.func.vmap`), and the result is cast to the layers' dtype once. The layers then compute
with pieces of it; afterwards the gradients of the pieces go back through the formula, again
stacked, to the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lycotool.algorithms import dora
from lycotool.algorithms.training import low_rank_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from lycotool.training.adapter import AdapterLayer


class OperandMaker:
    """Makes the operands of a network's layers at the start of a forward pass.

    Layers without a structured form, and those whose slots are masked, make theirs by themselves.

    Parameters
    ----------
    layers
        All of them.
    """

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        stacks: dict[object, list[AdapterLayer]] = {}
        for layer in layers:
            if layer.structured is not None and not layer.mask_specs:
                stacks.setdefault(_kind(layer), []).append(layer)
        self._stacks = [_Stack(tuple(found)) for found in stacks.values()]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Give every layer its operands; at the end, the parameters the gradients that came of them.

        Gradients are added to those that parameters have.
        """
        made = [stack.make() for stack in self._stacks]
        try:
            yield
            for each in made:
                each.add_gradients()
        finally:
            for stack in self._stacks:
                for layer in stack.layers:
                    layer.prepared = None


def _kind(layer: AdapterLayer) -> object:
    """Equal for layers whose operands come from the same formula on equal shapes."""
    weight = layer.base_weight
    geometry = replace(layer.layer, bias=False, stride=(), padding=(), dilation=())
    slots = tuple((slot, parameter.shape, parameter.dtype) for slot, parameter in layer.trained())
    detected = layer.detected
    return (
        layer.algorithm.name, detected.layout.name, detected.dora_axis, layer.dims, tuple(layer.switches.items()),
        geometry, slots, weight.dtype, weight.device,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Stack:
    """Layers that are alike."""

    layers: tuple[AdapterLayer, ...]

    def make(self) -> _Made:
        """Compute the operands of all layers, and hand them out."""
        parameters = [dict(layer.trained()) for layer in self.layers]
        first = self.layers[0]
        with torch.enable_grad():
            slots = {
                slot: torch.stack([each[slot].detach() for each in parameters]).requires_grad_()
                for slot in parameters[0]
            }
            operands = torch.func.vmap(first.operands_of)(slots)
            if first.detected.dora_slot is not None:
                operands = operands | {"gain": self._gains(slots, operands)}
            dtype = first.base_weight.dtype
            cast = {name: operand.to(dtype) for name, operand in operands.items()}
        names = tuple(cast)
        pieces = [
            {name: piece.requires_grad_() for name, piece in zip(names, row, strict=True)}
            for row in zip(*(cast[name].detach().unbind(0) for name in names), strict=True)
        ]
        for layer, own in zip(self.layers, pieces, strict=True):
            layer.prepared = own
        return _Made(parameters, slots, cast, pieces)

    def _gains(self, slots: dict[str, Tensor], operands: dict[str, Tensor]) -> Tensor:
        """DoRA's: the products with each W by themselves, the rest for all."""
        axis, slot = self.layers[0].detected.dora_axis, self.layers[0].detected.dora_slot
        if axis is None or slot is None:
            raise TypeError(self.layers[0].detected.label)
        half = [operand.to(self.layers[0].base_weight.dtype).unbind(0) for operand in operands.values()]
        lows = [low_rank_of(dict(zip(operands, row, strict=True))) for row in zip(*half, strict=True)]
        pairs = zip(self.layers, lows, strict=True)
        stacked = torch.stack([dora.product_with_base(layer.base_weight, low, axis) for layer, low in pairs])
        products = stacked.to(slots[slot].dtype)

        def gain(magnitude: Tensor, squares: Tensor, made: dict[str, Tensor], product: Tensor) -> Tensor:
            return dora.gain(magnitude, squares, low_rank_of(made), product, axis)

        squares = torch.stack([layer.squares for layer in self.layers])
        gains: Tensor = torch.func.vmap(gain)(slots[slot], squares, operands, products)
        return gains


@dataclass(frozen=True, slots=True)
class _Made:
    """Operands of a stack with what they came from."""

    parameters: list[dict[str, Parameter]]
    slots: dict[str, Tensor]
    operands: dict[str, Tensor]
    pieces: list[dict[str, Tensor]]

    def add_gradients(self) -> None:
        """Take the pieces' gradients back through the formula, and add them to the parameters'."""
        gradients = [torch.stack([_gradient(piece[name]) for piece in self.pieces]) for name in self.operands]
        found = torch.autograd.grad(list(self.operands.values()), list(self.slots.values()), gradients)
        for slot, gradient in zip(self.slots, found, strict=True):
            _add([each[slot] for each in self.parameters], gradient)


def _add(parameters: Sequence[Parameter], gradients: Tensor) -> None:
    """Add stacked gradients to the parameters' own, in as few kernels as there are."""
    held, added = [], []
    for parameter, gradient in zip(parameters, gradients.unbind(0), strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            held.append(parameter.grad)
            added.append(gradient)
    if held:
        torch._foreach_add_(held, added)


def _gradient(piece: Tensor) -> Tensor:
    return torch.zeros_like(piece) if piece.grad is None else piece.grad
