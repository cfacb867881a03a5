"""The layers of a checkpoint, found by an adapter module's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.models.naming import ANY, split_name, split_path

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Param:
    """A checkpoint tensor, some rows of one, or its transpose.

    OpenCLIP keeps q, k and v in one ``in_proj_weight``, which an adapter names apart, and
    its ``text_projection`` is the transpose of the linear layer an adapter means. ``shape``
    is that of the adapter's layer.
    """

    key: str
    shape: Shape
    rows: tuple[int, int] | None = None
    is_transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The layer's weight as a view of the checkpoint's tensor."""
        if self.is_transposed:
            return tensor.T
        return tensor if self.rows is None else tensor[slice(*self.rows)]


@dataclass(frozen=True, slots=True)
class Layer:
    """What one adapter module changes: a weight, and a bias where the layer has one."""

    path: str
    weight: Param
    bias: Param | None


class AmbiguousNameError(LookupError):
    """A module's name fits several layers; the text lists them."""


class LayerIndex:
    """Finds layers by adapter module names, whatever program wrote either.

    Parameters
    ----------
    shapes
        Name and shape of every tensor of the checkpoint.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._layers: dict[tuple[str, str], list[Layer]] = {}
        self._components: dict[str, None] = {}
        for key in shapes:
            for layer in _layers_at(key, shapes):
                component, path = split_path(layer.path)
                self._components.setdefault(component)
                self._layers.setdefault((component, path), []).append(layer)

    @property
    def places(self) -> Mapping[tuple[str, str], Layer]:
        """Every layer by component and canonical path, in the checkpoint's order.

        Raises
        ------
        AmbiguousNameError
            If two layers of the checkpoint have the same canonical path.
        """
        for place, layers in self._layers.items():
            if len(layers) > 1:
                paths = " and ".join(layer.path for layer in layers)
                raise AmbiguousNameError(f"{place[1]} is both {paths}")
        return {place: layers[0] for place, layers in self._layers.items()}

    def find(self, module: str) -> Layer | None:
        """The layer a module's name means, or None.

        Raises
        ------
        AmbiguousNameError
            If the name fits more than one layer.
        """
        component, path = split_name(module).place
        # A checkpoint without known prefixes is one component, whatever it is called.
        components = self._components if component == ANY else (component, ANY)
        found = [layer for c in components for layer in self._layers.get((c, path), ())]
        if len(found) > 1:
            raise AmbiguousNameError("fits " + " and ".join(layer.path for layer in found))
        return found[0] if found else None


def _layers_at(key: str, shapes: Mapping[str, Shape]) -> list[Layer]:
    """The layers whose weight is this tensor: none for biases, three for a fused q/k/v."""
    if key.endswith(".in_proj_weight"):
        return _fused_attention(key, shapes)
    if key.endswith((".bias", ".in_proj_bias")):
        return []
    if key.endswith(".text_projection") and len(shapes[key]) == 2:
        return [Layer(key, Param(key, shapes[key][::-1], is_transposed=True), None)]
    path = key.removesuffix(".weight")
    bias_key = f"{path}.bias"
    bias = Param(bias_key, shapes[bias_key]) if bias_key in shapes and key != path else None
    return [Layer(path, Param(key, shapes[key]), bias)]


def _fused_attention(key: str, shapes: Mapping[str, Shape]) -> list[Layer]:
    path = key.removesuffix(".in_proj_weight")
    bias_key = f"{path}.in_proj_bias"
    rows, *rest = shapes[key]
    third = rows // 3
    layers = []
    for position, letter in enumerate("qkv"):
        part = (position * third, (position + 1) * third)
        weight = Param(key, (third, *rest), part)
        bias = Param(bias_key, (third,), part) if bias_key in shapes else None
        layers.append(Layer(f"{path}.{letter}_proj", weight, bias))
    return layers
