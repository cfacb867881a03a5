"""merge: a checkpoint and adapters to a checkpoint, or adapters to one adapter.

Into a checkpoint: ``W' = W + Σ wᵢ·ΔWᵢ`` (see :mod:`lycotool.ops.bake`). Adapters: one
adapter whose change is ``Σ wᵢ·ΔWᵢ`` exactly, in the form that stays smallest:

1. a module of one adapter alone keeps its algorithm, its weight folded into one factor;
2. algorithms closed under addition keep their form (full, norm, (IA)³ of one axis, GLoRA);
3. whatever has exact low-rank factors becomes a LoRA of the summed ranks, with a CP core
   when all parts have one (LoHa by Khatri-Rao, LoKr by Kronecker products);
4. the rest becomes a full difference, from the base weight where an algorithm needs it.

The registry's merge rules are obeyed unless ``rebuild`` overrides them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lycotool.errors import IncompatibleError, RefusedError, UsageError
from lycotool.formats.keys import SPELLED
from lycotool.io.dtypes import from_torch
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.ops._adapter import Adapter, AdapterInput, AdapterModule, is_adapter, read_adapter
from lycotool.ops._common import (
    AdapterReport,
    NoProgress,
    Progress,
    as_bytes,
    check_suffix,
    default_name,
    provenance,
)
from lycotool.ops._merger import Merged, Merger, Part
from lycotool.ops._naming import NamingStyle, places
from lycotool.ops._render import (
    STALE_METADATA,
    network_arguments,
    without_alpha,
)
from lycotool.ops._strengths import StrengthOptions, Weighted, weigh
from lycotool.ops.bake import BakeOptions, BakeResult, fold, open_adapters

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions(BakeOptions):
    """What `merge` has beside the common options.

    ``rebuild`` overrides the registry's rules. ``base`` is a checkpoint for algorithms whose
    change depends on it. ``metadata`` says whose metadata an adapter merge keeps.
    """

    rebuild: bool = False
    base: str | None = None
    metadata: Literal["first", "union", "none"] = "first"


@dataclass(frozen=True, slots=True)
class AdapterMergeResult:
    """The adapter that was written, or would be."""

    output: str
    modules: int
    algorithms: dict[str, int]
    tensors: int
    nbytes: int
    adapters: tuple[AdapterReport, ...]
    warnings: tuple[str, ...]
    dry_run: bool


def merge(
    base: AdapterInput,
    adapters: Sequence[AdapterInput],
    options: MergeOptions,
    *,
    progress: Progress | None = None,
) -> BakeResult | AdapterMergeResult:
    """Merge ``adapters`` into ``base``, a checkpoint or an adapter.

    Raises
    ------
    RefusedError
        If a registry rule refuses an algorithm and ``options.rebuild`` is off.
    IncompatibleError
        If nothing matches, shapes differ, or an algorithm needs a base that is not given.
    """
    progress = progress or NoProgress()
    with ExitStack() as files:
        store = files.enter_context(open_store(base.path, allow_pickle=options.allow_pickle))
        into_adapter = is_adapter(store)
        opened = open_adapters(adapters, options, files, None if into_adapter else store)
        if into_adapter:
            adapter = read_adapter(store, reading=options.reading)
            adapter.require_sound()
            opened.insert(0, weigh(adapter, base, options.strengths))
        elif base != AdapterInput(base.path):
            raise UsageError("a checkpoint takes no strength", path=base.path)
        if not adapters and (not into_adapter or _is_idle(base, options)):
            raise UsageError(
                "there is nothing to merge", hint="name an adapter, or weigh this one's blocks with `--lbw`"
            )
        for weighted in opened:
            if not options.rebuild:
                _obey_rules(weighted.adapter)
        ending = "" if store.kind == "diffusers" else ".safetensors"
        name = options.output or default_name([base.path, *(a.path for a in adapters)], ending)
        if not into_adapter:
            return fold(store, opened, name, options, command="merge", progress=progress)
        base_store = None
        if options.base is not None:
            base_store = files.enter_context(open_store(options.base, allow_pickle=options.allow_pickle))
        return _merge_adapters(opened, base_store, name, options, progress)


def _is_idle(base: AdapterInput, options: MergeOptions) -> bool:
    """Whether an adapter alone would come out as it went in."""
    return base == AdapterInput(base.path) and options.strengths == StrengthOptions()


def _obey_rules(adapter: Adapter) -> None:
    """Refuse what the registry says cannot be merged.

    Raises
    ------
    RefusedError
        Naming each rule, the number of modules it refuses, and the way on.
    """
    refused: dict[str, list[AdapterModule]] = {}
    for module in adapter.modules.values():
        if not module.detected.merge_rule.allowed:
            refused.setdefault(module.detected.label, []).append(module)
    if not refused:
        return
    rules = {label: modules[0].detected.merge_rule for label, modules in refused.items()}
    total = sum(len(modules) for modules in refused.values())
    details = [
        f"{label}: {len(modules)} modules: {rules[label].reason}" for label, modules in refused.items()
    ]
    raise RefusedError(
        f"{total} of {len(adapter.modules)} modules cannot be merged",
        path=adapter.path,
        details=details,
        hint=next(iter(rules.values())).remedy,
    )


def _merge_adapters(
    adapters: Sequence[Weighted],
    base_store: TensorStore | None,
    output: str,
    options: MergeOptions,
    progress: Progress,
) -> AdapterMergeResult:
    check_suffix(output)
    sources = [*(a.adapter.store for a in adapters), *([base_store] if base_store else [])]
    inputs = [path for source in sources for path in source.files]
    target = (
        None
        if output == "-" and options.dry_run
        else prepare_output(output, inputs=inputs, force=options.force)
    )
    warnings = [warning for a in adapters for warning in a.adapter.warnings]
    if options.strict and warnings:
        raise IncompatibleError("`--strict` makes warnings errors", details=warnings)
    warnings += [note for a in adapters for note in a.adapter.notes]

    groups = _group(adapters)
    merger = Merger(options, base_store)
    merger.check(groups)
    style = NamingStyle(adapters[0].adapter.modules)
    spelling = adapters[0].adapter.keys.spelling
    tensors: dict[str, Tensor] = {}
    merged: list[Merged] = []
    progress.start("merge", sum(a.adapter.store.nbytes for a in adapters))
    for place, parts in groups.items():
        result = merger.merge(place, parts)
        merged.append(result)
        name = style.rename(parts[0].module.name, path=parts[0].adapter.path)
        slots = result.slots
        if spelling != "kohya" and "lora_up.weight" in slots:
            slots = without_alpha(slots)
        for slot, tensor in slots.items():
            key = f"{name}.{SPELLED[spelling].get(slot, slot)}"
            if key in tensors:
                raise IncompatibleError("two layers of the inputs would get this name", path=output, key=key)
            tensors[key] = tensor
        progress.advance(sum(p.adapter.store.info(k).nbytes for p in parts for k in p.module.keys.values()))
    for weighted in adapters:
        for key in weighted.adapter.keys.embeddings:
            tensors.setdefault(key, weighted.adapter.store.tensor(key))

    plans = {key: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    plan = FilePlan(plans, _metadata(adapters, merged, options), hashed=True)
    if not options.dry_run:
        write_file(target, plan, lambda key: [as_bytes(tensors[key])])
    labels: dict[str, int] = {}
    for result in merged:
        labels[result.label] = labels.get(result.label, 0) + 1
    return AdapterMergeResult(
        output=output,
        modules=len(merged),
        algorithms=labels,
        tensors=len(plans),
        nbytes=plan.nbytes,
        adapters=tuple(weighted.report for weighted in adapters),
        warnings=(*warnings, *merger.warnings),
        dry_run=options.dry_run,
    )


def _group(adapters: Sequence[Weighted]) -> dict[tuple[str, str], list[Part]]:
    """Modules by the layer they change, in the adapters' order.

    Raises
    ------
    IncompatibleError
        If one adapter names a layer twice.
    """
    known = [place for a in adapters for place in places(a.adapter.modules, ()).values()]
    groups: dict[tuple[str, str], list[Part]] = {}
    for weighted in adapters:
        adapter = weighted.adapter
        for name, place in places(adapter.modules, known).items():
            weight = weighted.of(name)
            if weight == 0 and weighted.strength != 0:
                continue  # a block that is left out
            parts = groups.setdefault(place, [])
            if any(part.adapter is adapter for part in parts):
                raise IncompatibleError(
                    f"names the same layer as {parts[-1].module.name}", path=adapter.path, key=name
                )
            parts.append(Part(adapter, adapter.modules[name], weight))
    return groups


def _metadata(
    adapters: Sequence[Weighted], merged: Sequence[Merged], options: MergeOptions
) -> dict[str, str]:
    """The first adapter's metadata (or all, or none), true for the result."""
    metadata: dict[str, str] = {}
    if options.metadata != "none":
        chosen = adapters if options.metadata == "union" else adapters[:1]
        for weighted in chosen:
            metadata = {**weighted.adapter.store.metadata, **metadata}
        metadata = {key: value for key, value in metadata.items() if key not in STALE_METADATA}
    ranks = {result.rank for result in merged if result.rank is not None}
    labels = {result.label.split(" ")[0] for result in merged}
    if ranks:
        metadata["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        metadata["ss_network_alpha"] = metadata["ss_network_dim"]
    metadata |= network_arguments(metadata, labels)
    recipe = [weighted.recipe for weighted in adapters]
    return metadata | provenance("merge", json.dumps({"adapters": recipe, "rebuild": options.rebuild}))
