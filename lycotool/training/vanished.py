"""Which values that vanish in a saved adapter are worth a word: those whose change of the model is.

A factor of a product says little alone: its partner multiplies it. So a tensor that lost more than
rounding takes (:mod:`lycotool.linalg.underflow`) is judged by ΔW with it as it is and as it is saved::

    √Σ ‖ΔWᵢ - ΔW′ᵢ‖² <= 2⁻⁸ √Σ ‖ΔWᵢ‖²

The left sums over all modules of a component (the UNet, a text encoder) that lost something, the right
over all there are: such a loss is no more than rounding to bfloat16 may take from the component. An
example is a layer whose output a group norm undoes, so that it is hardly trained. Always told of is
what lost most of its norm, for then a module is gone, however small it was; and what does not change
a weight, as biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.underflow import ACCEPTED, Underflow
from lycotool.training.norms import change_norm

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.training.adapter import AdapterLayer
    from lycotool.training.network import Network

#: Of its norm: who lost more is always told of.
_MOST = 0.5


def forget_what_changes_nothing(underflow: Underflow, network: Network, saved: Mapping[str, Tensor]) -> None:
    """Strike the tensors whose loss is nothing beside their component's change.

    Parameters
    ----------
    saved
        By key, what :meth:`Network.export` gave.
    """
    lost: dict[str, dict[str, float]] = {}  # by component, by key
    for name, component, layer in network.named():
        keys = {f"{name}.{slot}": slot for slot in layer.slots()}
        small = [key for key in keys if key in underflow.found and underflow.found[key].share < _MOST]
        if small:
            norm = _lost(layer, {keys[key]: saved[key] for key in small})
            if norm > 0:
                lost.setdefault(component, {}).update(dict.fromkeys(small, norm / math.sqrt(len(small))))
    for component, norms in lost.items():
        whole = math.hypot(
            *(float(change_norm(layer)) for _, own, layer in network.named() if own == component)
        )
        if math.hypot(*norms.values()) <= ACCEPTED * whole:
            for key in norms:
                del underflow.found[key]


@torch.no_grad()
def _lost(layer: AdapterLayer, saved: Mapping[str, Tensor]) -> float:
    """``‖ΔW - ΔW′‖``, where ΔW′ has these tensors as they are saved."""
    exact = layer.slots()
    rounded = {slot: tensor.to(exact[slot]) for slot, tensor in saved.items()}
    difference = layer.change_with({**exact, **rounded}).sub_(layer.change_with(exact))
    return float(torch.linalg.vector_norm(difference))
