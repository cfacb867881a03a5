"""Modules as adapter files store them: alphas, dtypes, kernels, and the metadata about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lycotool.algorithms.alpha import alpha_tensor as alpha_tensor
from lycotool.algorithms.base import Shape
from lycotool.formats.keys import SPELLED
from lycotool.io.dtypes import FLOATING, from_torch
from lycotool.io.hashes import LEGACY_HASH, MODEL_HASH
from lycotool.io.header import DTYPE_BITS
from lycotool.linalg.underflow import Underflow
from lycotool.models.naming import unet_kernel
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._common import cast_checked

if TYPE_CHECKING:
    from torch import Tensor

#: Metadata that is no longer true once tensors have changed.
STALE_METADATA = frozenset({MODEL_HASH, LEGACY_HASH, "modelspec.hash_sha256", "lora_adapter_metadata"})


def outline(module: AdapterModule) -> tuple[int | None, int | None]:
    """Rows and columns of the flattened weight, as far as the tensors tell."""
    layout, sizes = module.detected.layout, module.detected.sizes
    return layout.rows(sizes), layout.columns(sizes)


def kernel_of(place: tuple[str, str], modules: Sequence[AdapterModule]) -> Shape:
    """The kernel of the layer that these modules change, ``()`` for a linear one.

    LoHa and LoKr may store convolutions flattened; then another module of the same layer
    tells the kernel, or the layer's name does.
    """
    for module in modules:
        kernel = module.detected.sizes.get("kernel")
        if isinstance(kernel, tuple) and kernel:
            return kernel
    if any(module.detected.algorithm.name in ("lora", "dylora") for module in modules):
        return ()
    return unet_kernel(place[1]) or () if place[0] in ("unet", "any") else ()


def common_dtype(modules: Iterable[tuple[Adapter, AdapterModule]]) -> str:
    """The narrowest dtype that holds the values of every module."""
    dtypes = {
        adapter.store.info(key).dtype
        for adapter, module in modules
        for slot, key in module.keys.items()
        if slot != "alpha"
    } & FLOATING
    if len(dtypes) == 1:
        return next(iter(dtypes))
    if {"F16", "BF16"} <= dtypes:
        return "F32"
    widest = max(dtypes, key=lambda dtype: (DTYPE_BITS[dtype], dtype))
    return "F16" if widest.startswith("F8") else widest


def kept_form(
    adapter: Adapter, module: AdapterModule, *, weight: float, save: Callable[[Tensor, str, str], Tensor]
) -> dict[str, Tensor]:
    """A module in its own form, ``weight`` folded into the slots it is linear in.

    The stored tensors alone tell the scale afterwards: an alpha is written where it was
    missing, or stood for something else.

    Parameters
    ----------
    save
        ``(tensor, stored dtype, key)`` to the tensor to be written.
    """
    detected, dims, store = module.detected, module.dims, adapter.store
    # A scale from outside the file (PEFT's config) has to enter the tensors where no alpha
    # can carry it.
    factor = weight * (dims.scale if dims.rank is None else 1.0)
    unused = {slot.name for slot in detected.layout.slots if slot.unused}
    slots: dict[str, Tensor] = {}
    for slot, key in module.keys.items():
        if slot not in unused:
            tensor = store.tensor(key)
            if factor != 1.0 and slot in detected.layout.linear_in:
                tensor = tensor.float() * factor
            slots[slot] = save(tensor, store.info(key).dtype, key)
    if dims.rank is not None and (not dims.alpha or adapter.reading.dylora_block_size != 1):
        slots["alpha"] = alpha_tensor(dims.scale * dims.rank, slots)
    return slots


def without_alpha(slots: dict[str, Tensor], name: str, underflow: Underflow) -> dict[str, Tensor]:
    """The LoRA of this name for dialects without alpha: ``c`` folded into the up factor."""
    alpha = slots.get("alpha")
    if alpha is None:
        return slots
    scale = float(alpha) / slots["lora_down.weight"].shape[0]
    rest = {slot: tensor for slot, tensor in slots.items() if slot != "alpha"}
    if scale != 1.0:
        for slot in ("lora_up.weight", "lora_up.bias"):
            if slot in rest:
                scaled = rest[slot].float() * scale
                dtype, key = from_torch(rest[slot].dtype), f"{name}.{slot}"
                rest[slot] = cast_checked(scaled, dtype, path="the result", key=key, underflow=underflow)
    return rest


def spelled(
    adapter: Adapter, module: AdapterModule, slots: dict[str, Tensor], underflow: Underflow
) -> dict[str, Tensor]:
    """A module's slots by key, in the file's spelling and without an alpha where it has none."""
    spelling = adapter.keys.spelling
    if spelling != "kohya" and "alpha" not in module.keys and "lora_up.weight" in slots:
        slots = without_alpha(slots, module.name, underflow)
    return {
        module.keys.get(slot, f"{module.name}.{SPELLED[spelling].get(slot, slot)}"): tensor
        for slot, tensor in slots.items()
    }


def network_arguments(metadata: Mapping[str, str], labels: set[str]) -> dict[str, str]:
    """``ss_network_args`` with the algorithm the result has."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "null"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(arguments, dict) or "algo" not in arguments:
        return {}
    if labels <= {"lora", "full", "norm"} and "lora" in labels:
        arguments["algo"] = "locon"
        arguments.pop("rs_lora", None)  # folded into the stored scale
    return {"ss_network_args": json.dumps(arguments)}
