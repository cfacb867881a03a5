"""Starting from an adapter file: ``network_weights``, with or without ``dim_from_weights``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lycotool.algorithms import dora
from lycotool.algorithms.training import Arguments, CannotTrainError, Start, Training

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.base import Algorithm, Bound
    from lycotool.algorithms.detection import Detected
    from lycotool.training.adapter import AdapterLayer
    from lycotool.training.network_options import NetworkOptions


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module of the file: what it is, and its tensors in float32."""

    detected: Detected
    module: Bound


def continued(loaded: Loaded, options: NetworkOptions) -> tuple[Algorithm, Start, Arguments]:
    """Algorithm, values, rank and alpha of a file's module, as a start.

    Raises
    ------
    CannotTrainError
        If the module has a form that is not trained.
    """
    detected, dims = loaded.detected, loaded.module.dims
    trained, fixed = _split(loaded)
    # The scale the file is read with, whatever its alpha; a bound is no scale.
    alpha = dims.alpha if dims.rank is None else dims.scale * dims.rank
    arguments = Arguments(
        rank=dims.rank or 1,
        alpha=alpha or 0.0,
        dora=detected.dora_axis,
        use_scalar=bool(options.use_scalar),
        block_size=4 if options.block_size is None else options.block_size,
    )
    return detected.algorithm, Start(detected.layout, trained, fixed, alpha), arguments


@torch.no_grad()
def adopt(layer: AdapterLayer, loaded: Loaded) -> None:
    """Take the values of a file's module, its scale folded in where it is another.

    Raises
    ------
    CannotTrainError
        If the module is of another form or size.
    """
    mine, theirs = layer.detected, loaded.detected
    if (mine.label, mine.layout) != (theirs.label, theirs.layout):
        raise CannotTrainError(f"is {theirs.label} in the file, {mine.label} is trained")
    trained, fixed = _split(loaded)
    bound = loaded.module.dims.alpha or 0.0
    if layer.training_of.shrinking == "parameters" and bound != layer.alpha:
        raise CannotTrainError(f"has constraint {bound:g} in the file, {layer.alpha or 0:g} here")
    if any(bool(tensor.item()) != bool(layer.fixed[slot].item()) for slot, tensor in fixed.items()):
        raise CannotTrainError("is on the other side in the file")
    own = {slot: parameter for slot, parameter in layer.trained() if slot != "scalar"}
    if own.keys() != trained.keys():
        raise CannotTrainError(
            f"has {', '.join(sorted(trained))} in the file, expected {', '.join(sorted(own))}"
        )
    ratio = loaded.module.dims.scale / layer.dims.scale
    for slot, parameter in own.items():
        if parameter.shape != trained[slot].shape:
            raise CannotTrainError(
                f"{slot} has shape {list(trained[slot].shape)} in the file, expected {list(parameter.shape)}"
            )
        is_scaled = slot in mine.layout.linear_in and ratio != 1
        parameter.copy_(trained[slot] * ratio if is_scaled else trained[slot])
    if layer.scalar is not None:
        layer.scalar.fill_(1.0)


def _split(loaded: Loaded) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Slots to train and fixed ones; the magnitude by LyCORIS' name and shape."""
    detected, training = loaded.detected, loaded.detected.algorithm.training
    if not isinstance(training, Training):
        raise CannotTrainError(f"{detected.algorithm.name} cannot be trained: {training.reason}")
    if detected.layout not in training.layouts:
        raise CannotTrainError(
            f"the form {detected.layout.name!r} of {detected.algorithm.name} is not trained"
        )
    trained: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for slot, tensor in loaded.module.tensors.items():
        if slot == detected.dora_slot and detected.dora_axis is not None:
            trained[dora.DORA_SCALE.name] = tensor
        elif not tensor.is_floating_point():
            fixed[slot] = tensor
        elif slot in detected.layout.required | training.optional:
            trained[slot] = tensor
        else:
            raise CannotTrainError(f"{slot} is not trained")
    return trained, fixed
