"""Bring an adapter's modules into the naming of the checkpoint they are folded into.

A Flux LoRA from diffusers names ``to_q``, ``to_k`` and ``to_v`` where the published checkpoint
has one ``qkv``; the families' tables tell, and :mod:`lycotool.ops.convert` splits and fuses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.errors import IncompatibleError
from lycotool.formats.dialects import DIALECTS, Dialect
from lycotool.io.memory import MemoryFile
from lycotool.io.store import Entry, TensorStore
from lycotool.models.families import FAMILIES, families_of
from lycotool.models.families.table import Naming, path_key
from lycotool.models.layers import AmbiguousNameError, LayerIndex
from lycotool.models.naming import ANY, split_name
from lycotool.ops._adapter import Adapter, AdapterModule, read_adapter
from lycotool.ops._common import NoProgress
from lycotool.ops._convert_plan import make_plan
from lycotool.ops._converter import Converter
from lycotool.ops.convert import ConvertOptions

if TYPE_CHECKING:
    from torch import Tensor


def aligned(adapter: Adapter, checkpoint: TensorStore) -> Adapter:
    """The adapter as it is where it fits; else its denoiser's modules as the checkpoint cuts them.

    Raises
    ------
    IncompatibleError
        If modules cannot be split or fused as the checkpoint asks, naming each.
    """
    layers = LayerIndex(checkpoint.shapes)
    strangers = [module for module in adapter.modules.values() if not _fits(layers, module.name)]
    if not strangers:
        return adapter
    paths = {
        split_name(key.removesuffix(".weight")).path
        for key in checkpoint.entries
        if split_name(key).component in ("unet", ANY)
    }
    plans = {
        short: make_plan(strangers, FAMILIES[short], _dialect_of(short, paths))
        for short in families_of(paths)
    }
    placed = {
        short: sum(layers.find(target.name) is not None for target in plan.targets) - len(plan.faults)
        for short, plan in plans.items()
    }
    short = max(placed, key=lambda short: placed[short], default=None)
    if short is None or not any(layers.find(target.name) for target in plans[short].targets):
        return adapter
    plan, dialect = plans[short], _dialect_of(short, paths)
    known = set(plan.faults)
    plan.faults.clear()  # what the tables do not have stays unmatched, and is reported so
    options = ConvertOptions(to=dialect.name, reading=adapter.reading)
    try:
        tensors = Converter(adapter, [short], dialect, options, None, NoProgress()).tensors(plan)
    except IncompatibleError as error:
        raise IncompatibleError(
            f"modules cannot be cut as the layers of {checkpoint.path} are",
            path=adapter.path,
            details=error.details,
            hint="`lycotool convert --algo lora` makes LoRA factors of them, which can",
        ) from None
    return _with_tensors(adapter, [m for m in strangers if m.name not in known], tensors)


def _fits(layers: LayerIndex, name: str) -> bool:
    try:
        return layers.find(name) is not None
    except AmbiguousNameError:
        return True  # reported where the layer is looked for


def _dialect_of(short: str, paths: set[str]) -> Dialect:
    """A dialect that carries everything, in the naming of most of a checkpoint's layers."""
    table = FAMILIES[short].unet
    counts: dict[Naming, int] = {"diffusers": 0, "native": 0}
    for path in paths:
        for found in table.names(path_key(path)) & counts.keys():
            counts[found] += 1
    naming: Naming = "diffusers" if counts["diffusers"] > counts["native"] else "native"
    everything = DIALECTS["lycoris.kohya"]
    return replace(everything, naming=naming, denoiser="diffusion_model.", dotted=True)


def _with_tensors(adapter: Adapter, changed: list[AdapterModule], tensors: dict[str, Tensor]) -> Adapter:
    """The adapter with some modules' tensors replaced by others."""
    store = adapter.store
    gone = {key for module in changed for key in module.keys.values()}
    entries = {key: entry for key, entry in store.entries.items() if key not in gone}
    if tensors:
        memory = MemoryFile(next(iter(store.entries.values())).file.path, tensors, {})
        entries |= {key: Entry(memory, key) for key in tensors}
    made = read_adapter(replace(store, entries=entries, opened=()), reading=adapter.reading)
    return replace(made, notes=adapter.notes, warnings=adapter.warnings, recut=len(changed))
