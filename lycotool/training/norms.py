"""Norms of changes; ``scale_weight_norms``: none larger than a norm, as sd-scripts defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.training.adapter import AdapterLayer


@dataclass(frozen=True, slots=True)
class ShrunkNorms:
    """Norms after shrinking, as tensors: nothing waits for the device until they are read.

    Attributes
    ----------
    count
        How many were too large.
    mean, largest
        Of all norms.
    """

    count: Tensor
    mean: Tensor
    largest: Tensor


@torch.no_grad()
def shrink(layers: Sequence[AdapterLayer], value: float) -> ShrunkNorms:
    """Multiply changes with ``‖ΔW‖ > value`` by ``value / ‖ΔW‖``.

    The factor is spread evenly over the factors of a product, as sd-scripts does for LoRA
    (``networks/lora.py``, `apply_max_norm_regularization`): its root on each. Changes that are
    sums take it in the slots they are linear in; of rotations the norm of the blocks is bound
    (LyCORIS ``modules/diag_oft.py``). DoRA's magnitudes have no part in it.
    """
    norms, ratios = [], []
    for layer in layers:
        norm = _norm(layer)
        ratio = (norm / value).clamp_min(1.0).reciprocal()  # exactly 1 within the norm
        slots = _slots(layer)
        exponent = 1 / len(slots) if layer.training_of.shrinking == "product" else 1.0
        for slot in slots:
            layer.parameter(slot).mul_(ratio**exponent)
        norms.append(norm * ratio)
        ratios.append(ratio)
    after = torch.stack(norms)
    return ShrunkNorms((torch.stack(ratios) < 1).sum(), after.mean(), after.max())


def _slots(layer: AdapterLayer) -> list[str]:
    """The trained slots that are multiplied."""
    layout = layer.detected.layout
    if layer.training_of.shrinking == "linear":
        chosen = frozenset(layout.linear_in)
    elif layer.training_of.shrinking == "product":
        chosen = layout.required
    else:
        chosen = frozenset({"oft_blocks"})
    return [slot for slot, _ in layer.trained() if slot in chosen]


@torch.no_grad()
def change_norm(layer: AdapterLayer) -> Tensor:
    """``‖ΔW‖``, with DoRA's part of it and without what dropouts take."""
    if layer.detected.dora_slot is None:
        return _inner_norm(layer)
    was_training = layer.training
    layer.eval()
    change = layer.weight_change()
    layer.train(was_training)
    return _frobenius(change)


def _norm(layer: AdapterLayer) -> Tensor:
    """``‖ΔW‖`` below DoRA, or of the blocks of a rotation."""
    if layer.training_of.shrinking == "parameters":
        return _frobenius(layer.parameter("oft_blocks"))
    return _inner_norm(layer)


def _inner_norm(layer: AdapterLayer) -> Tensor:
    """``‖ΔW‖`` below DoRA, without ΔW where it has factors."""
    was_training = layer.training
    layer.eval()  # the whole change, not what a step left of it
    module, algorithm = layer.module(), layer.algorithm
    layer.train(was_training)
    if algorithm.kronecker_parts is not None:
        first, second = algorithm.kronecker_parts(module)
        return first.norm() * second.norm()
    low = None if algorithm.factors is None else algorithm.factors(module)
    return _frobenius(layer.inner_change(module)) if low is None else low.norm()


def _frobenius(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm
