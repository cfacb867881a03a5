"""A module's tensors as a dialect stores them: suffixes, alpha or none, magnitudes, biases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.algorithms import dora, glora
from lycotool.formats.dialects import Dialect
from lycotool.io.dtypes import from_torch
from lycotool.linalg.underflow import Underflow
from lycotool.ops._common import cast_checked, saved_dtype
from lycotool.ops._convert_forms import Form
from lycotool.ops._render import alpha_tensor

if TYPE_CHECKING:
    from torch import Tensor

#: Slots that hold counts and switches rather than weights.
_KEPT_AS_THEY_ARE = frozenset({"on_input", "bias_indices", "bias_size"})


@dataclass(frozen=True, slots=True)
class Rendered:
    """One module as stored: tensors by key, and the rank and alpha readers compute ``c`` from."""

    tensors: dict[str, Tensor]
    rank: int | None
    alpha: float | None


def render(
    form: Form, name: str, dialect: Dialect, *, dtype: str, path: str, underflow: Underflow
) -> Rendered:
    """Write one module in a dialect.

    Parameters
    ----------
    name
        What the dialect calls the module.
    dtype
        ``--dtype``; ``keep`` is the stored one.
    path
        The input, for errors.
    underflow
        Told what becomes zero.

    Raises
    ------
    NumericError
        If a value does not fit its dtype.
    """
    is_lora = "lora_up.weight" in form.slots
    scale = form.scale
    tensors = dict(form.slots)
    if is_lora:  # LyCORIS' DyLoRA leaves out the ones of a convolution's kernel
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        tensors["lora_up.weight"] = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2))
    # How often programs apply the scale of the old GLoRA layout differs; 1 is the same for all.
    is_contested = form.detected.layout is glora.OLD
    folds = (dialect.alpha == "folded" and is_lora) or form.dims.rank is None or is_contested
    if folds and scale != 1.0:
        for slot in form.detected.layout.linear_in:
            if slot in tensors and slot != "diff_b":
                tensors[slot] = _computable(tensors[slot]) * scale
        scale = 1.0
    _rename_bias(tensors, dialect, scale)
    _rename_magnitude(tensors, form, dialect)
    saved = {
        slot: _saved(tensor, form, slot, dtype, path=path, key=name, underflow=underflow)
        for slot, tensor in tensors.items()
    }
    rank = form.dims.rank
    alpha = None if rank is None else scale * rank
    if (stored := _alpha(form, dialect, alpha, scale, saved)) is not None:
        saved["alpha"] = stored
    keys = {_key(name, slot, dialect): tensor for slot, tensor in saved.items()}
    return Rendered(keys, rank, alpha)


def _saved(
    tensor: Tensor, form: Form, slot: str, dtype: str, *, path: str, key: str, underflow: Underflow
) -> Tensor:
    if slot in _KEPT_AS_THEY_ARE:
        return tensor
    stored = form.stored.get(slot, form.dtype)
    target = saved_dtype(dtype, from_torch(stored))
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch finds no extremes in float8
    saved = cast_checked(tensor, target, path=path, key=f"{key}.{slot}", underflow=underflow)
    return saved.contiguous()


def _alpha(
    form: Form, dialect: Dialect, alpha: float | None, scale: float, saved: Mapping[str, Tensor]
) -> Tensor | None:
    """The tensor that tells the scale, if one does."""
    if alpha is None:
        return form.alpha  # a constraint, or a number nobody reads
    if dialect.alpha == "is the scale":
        return alpha_tensor(scale, saved)
    if dialect.alpha == "config" or (dialect.alpha == "folded" and "lora_up.weight" in form.slots):
        return None
    if form.alpha is not None and float(form.alpha) == alpha:
        return form.alpha
    return alpha_tensor(alpha, saved)


def _computable(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return tensor if tensor.itemsize == 8 else tensor.float()


def _rename_bias(tensors: dict[str, Tensor], dialect: Dialect, scale: float) -> None:
    """``diff_b`` is the change itself, ``lora_up.bias`` is multiplied by ``c``."""
    if "lora_up.weight" not in tensors:
        return
    if dialect.bias_slot == "diff_b" and "lora_up.bias" in tensors:
        change = _computable(tensors.pop("lora_up.bias")) * scale
        tensors["diff_b"] = change + tensors["diff_b"] if "diff_b" in tensors else change
    elif dialect.bias_slot == "lora_up.bias" and "diff_b" in tensors and scale:
        change = _computable(tensors.pop("diff_b")) / scale
        tensors["lora_up.bias"] = change + tensors["lora_up.bias"] if "lora_up.bias" in tensors else change


def _rename_magnitude(tensors: dict[str, Tensor], form: Form, dialect: Dialect) -> None:
    """Bring the magnitude to the dialect's name and shape.

    kohya and LyCORIS: ``(out, 1…)`` or ``(1, in, 1…)``; PEFT: ``(out,)`` for linear layers and
    ``(1, out, 1…)`` for convolutions; ai-toolkit: ``(out,)``.
    """
    slot, axis = form.detected.dora_slot, form.detected.dora_axis
    if slot is None or axis is None:
        return
    if slot == dialect.dora_slot and slot == dora.DORA_SCALE.name and tensors[slot].ndim > 1:
        return
    magnitude = tensors.pop(slot).flatten()
    kernel = (1,) * _kernel_dims(tensors)
    if dialect.dora_slot == dora.DORA_SCALE.name:
        shape = (-1, 1, *kernel) if axis == "out" else (1, -1, *kernel)
    else:
        shape = (1, -1, *kernel) if kernel and dialect.dora_slot == dora.MAGNITUDE_VECTOR.name else (-1,)
    tensors[dialect.dora_slot] = magnitude.reshape(shape)


def _kernel_dims(tensors: Mapping[str, Tensor]) -> int:
    down = tensors.get("lora_down.weight")
    return 0 if down is None else down.ndim - 2


def _key(name: str, slot: str, dialect: Dialect) -> str:
    key = f"{name}.{dialect.infix}{dialect.suffixes.get(slot, slot)}"
    for pattern, replacement in dialect.respelled:
        key = re.sub(pattern, replacement, key)
    return key
