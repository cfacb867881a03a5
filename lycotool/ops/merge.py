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
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms import lora
from lycotool.algorithms.base import Bound, MismatchError, Shape
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError, RefusedError, UsageError
from lycotool.formats.keys import SPELLED
from lycotool.io.dtypes import from_torch
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.lazy import torch
from lycotool.linalg.low_rank import concat
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex
from lycotool.ops._adapter import Adapter, AdapterInput, AdapterModule, is_adapter, read_adapter
from lycotool.ops._common import (
    AdapterReport,
    NoProgress,
    Progress,
    WriteOptions,
    as_bytes,
    cast_checked,
    check_suffix,
    count_labels,
    default_name,
    listed,
    provenance,
    saved_dtype,
)
from lycotool.ops._naming import NamingStyle, places
from lycotool.ops._render import (
    STALE_METADATA,
    alpha_tensor,
    common_dtype,
    kept_form,
    kernel_of,
    network_arguments,
    outline,
    without_alpha,
)
from lycotool.ops.bake import BakeResult, fold, open_adapters

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.models.layers import Param


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions(WriteOptions):
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


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter's module at one place, with its weight in the sum."""

    adapter: Adapter
    module: AdapterModule
    weight: float


@dataclass(frozen=True, slots=True)
class _Merged:
    """A module of the result: slots in their saved dtypes, and what it is."""

    slots: dict[str, Tensor]
    label: str
    rank: int | None


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
        opened = open_adapters(adapters, options, files)
        into_adapter = is_adapter(store)
        if into_adapter:
            opened.insert(0, (read_adapter(store, reading=options.reading), base.strength))
        elif base.strength != 1.0:
            raise UsageError("a checkpoint takes no strength", path=base.path)
        for adapter, _ in opened:
            adapter.require_sound()
            if not options.rebuild:
                _obey_rules(adapter)
        ending = "" if store.kind == "diffusers" else ".safetensors"
        name = options.output or default_name([base.path, *(a.path for a in adapters)], ending)
        if not into_adapter:
            return fold(store, opened, name, options, command="merge", progress=progress)
        base_store = None
        if options.base is not None:
            base_store = files.enter_context(open_store(options.base, allow_pickle=options.allow_pickle))
        return _merge_adapters(opened, base_store, name, options, progress)


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
    adapters: Sequence[tuple[Adapter, float]],
    base_store: TensorStore | None,
    output: str,
    options: MergeOptions,
    progress: Progress,
) -> AdapterMergeResult:
    check_suffix(output)
    sources = [*(a.store for a, _ in adapters), *([base_store] if base_store else [])]
    inputs = [path for source in sources for path in source.files]
    target = (
        None
        if output == "-" and options.dry_run
        else prepare_output(output, inputs=inputs, force=options.force)
    )
    warnings = [warning for adapter, _ in adapters for warning in adapter.warnings]
    if options.strict and warnings:
        raise IncompatibleError("`--strict` makes warnings errors", details=warnings)
    warnings += [note for adapter, _ in adapters for note in adapter.notes]

    groups = _group(adapters)
    merger = _Merger(options, base_store)
    merger.check(groups)
    style = NamingStyle(adapters[0][0].modules)
    spelling = adapters[0][0].keys.spelling
    tensors: dict[str, Tensor] = {}
    merged: list[_Merged] = []
    progress.start("merge", sum(a.store.nbytes for a, _ in adapters))
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
    for adapter, _ in adapters:
        for key in adapter.keys.embeddings:
            tensors.setdefault(key, adapter.store.tensor(key))

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
        adapters=tuple(
            AdapterReport(a.path, w, len(a.modules), len(a.modules), (), count_labels(a)) for a, w in adapters
        ),
        warnings=(*warnings, *merger.warnings),
        dry_run=options.dry_run,
    )


def _group(adapters: Sequence[tuple[Adapter, float]]) -> dict[tuple[str, str], list[_Part]]:
    """Modules by the layer they change, in the adapters' order.

    Raises
    ------
    IncompatibleError
        If one adapter names a layer twice.
    """
    known = [place for adapter, _ in adapters for place in places(adapter.modules, ()).values()]
    groups: dict[tuple[str, str], list[_Part]] = {}
    for adapter, weight in adapters:
        for name, place in places(adapter.modules, known).items():
            parts = groups.setdefault(place, [])
            if any(part.adapter is adapter for part in parts):
                raise IncompatibleError(
                    f"names the same layer as {parts[-1].module.name}", path=adapter.path, key=name
                )
            parts.append(_Part(adapter, adapter.modules[name], weight))
    return groups


class _Merger:
    """Sums the modules of one place after the other, on one device."""

    def __init__(self, options: MergeOptions, base: TensorStore | None) -> None:
        self._options = options
        self._device = resolve_device(options.device)
        self._base = base
        self._layers = LayerIndex(base.shapes) if base is not None else None
        self.warnings: list[str] = []

    def check(self, groups: Mapping[tuple[str, str], Sequence[_Part]]) -> None:
        """Find what cannot be merged before any tensor is read.

        Raises
        ------
        IncompatibleError
            Listing modules of different sizes, and modules that need a base.
        """
        faults: list[str] = []
        baseless: list[str] = []
        for parts in groups.values():
            sizes = {outline(part.module) for part in parts}
            for axis, name in enumerate(("rows", "columns")):
                found = {size[axis] for size in sizes if size[axis] is not None}
                if len(found) > 1:
                    text = " and ".join(str(size) for size in sorted(s for s in found if s is not None))
                    faults.append(f"{parts[0].module.name}: {name} differ: {text}")
            if self._layers is None and not _is_baseless(parts):
                baseless.append(parts[0].module.name)
        if faults:
            raise IncompatibleError("the adapters are for different layers", details=listed(faults))
        if baseless:
            raise IncompatibleError(
                f"{len(baseless)} modules change the weight by an amount that depends on it",
                details=listed(baseless),
                hint="`--base CHECKPOINT` gives the weights, or `lycotool bake` folds each adapter",
            )

    def merge(self, place: tuple[str, str], parts: Sequence[_Part]) -> _Merged:
        """``Σ weight · ΔW`` as one module."""
        dtype = saved_dtype(self._options.dtype, common_dtype((p.adapter, p.module) for p in parts))
        if len(parts) == 1 and _keeps_form(parts[0]):
            return self._kept(parts[0])
        bounds = [
            (part.adapter.load(part.module, self._device, torch.float32), part.weight) for part in parts
        ]
        try:
            return (
                self._closed(parts, bounds, dtype)
                or self._low_rank(place, parts, bounds, dtype)
                or (self._dense(place, parts, bounds, dtype))
            )
        except MismatchError as error:
            raise IncompatibleError(
                str(error), path=parts[0].adapter.path, key=parts[0].module.name
            ) from None

    def _kept(self, part: _Part) -> _Merged:
        """One adapter's module in its own form, its weight folded into one factor."""
        part.adapter.load(part.module, self._device, torch.float32)  # refuses NaN and Inf
        slots = kept_form(part.adapter, part.module, weight=part.weight, save=self._cast)
        return _Merged(slots, part.module.detected.label, part.module.dims.rank)

    def _closed(
        self, parts: Sequence[_Part], bounds: list[tuple[Bound, float]], dtype: str
    ) -> _Merged | None:
        """The sum in the parts' own form, where the algorithm is closed under addition."""
        algorithm = parts[0].module.detected.algorithm
        if algorithm.concat is None or any(
            part.module.detected.algorithm is not algorithm or part.module.detected.dora_slot
            for part in parts
        ):
            return None
        slots = algorithm.concat(bounds)
        if slots is None:
            return None
        return self._saved(slots, dtype, parts, algorithm.name)

    def _low_rank(
        self, place: tuple[str, str], parts: Sequence[_Part], bounds: list[tuple[Bound, float]], dtype: str
    ) -> _Merged | None:
        """The sum as one LoRA, where every part has exact factors."""
        factors = []
        for part, (bound, weight) in zip(parts, bounds, strict=True):
            compute = part.module.detected.algorithm.factors
            if compute is None or part.module.detected.dora_slot is not None:
                return None
            low = compute(bound)
            if low is None:
                return None
            factors.append(low.scaled(weight))
        total = concat(factors)
        if any(part.module.detected.algorithm.name not in ("lora", "dylora") for part in parts):
            total = total.capped()
        shape = self._shape(place, parts)
        if total.core is not None:
            total = total if math.prod(shape[2:]) == total.core[0, 0].numel() else total.folded()
        slots = lora.from_factors(total, shape[2:], torch.float32)
        self._add_bias(slots, parts, bounds)
        label = "lora (cp)" if "lora_mid.weight" in slots else "lora"
        return self._saved(slots, dtype, parts, label)

    def _dense(
        self, place: tuple[str, str], parts: Sequence[_Part], bounds: list[tuple[Bound, float]], dtype: str
    ) -> _Merged:
        """The sum as a full difference."""
        shape = self._shape(place, parts)
        base = None
        if any(part.module.detected.needs_base for part in parts):
            base = self._base_weight(parts[0])
        total: Tensor | None = None
        for part, (bound, weight) in zip(parts, bounds, strict=True):
            change = weight_change(part.module.detected, bound, shape, base, strength=weight)
            total = change if total is None else total + change
        if total is None:
            raise ValueError("nothing to merge")
        slots = {"diff": total}
        self._add_bias(slots, parts, bounds)
        return self._saved(slots, dtype, parts, "full")

    def _add_bias(
        self, slots: dict[str, Tensor], parts: Sequence[_Part], bounds: list[tuple[Bound, float]]
    ) -> None:
        for part, (bound, weight) in zip(parts, bounds, strict=True):
            change = bias_change(part.module.detected, bound, strength=weight)
            if change is not None:
                slots["diff_b"] = slots["diff_b"] + change if "diff_b" in slots else change

    def _saved(self, slots: Mapping[str, Tensor], dtype: str, parts: Sequence[_Part], label: str) -> _Merged:
        name = parts[0].module.name
        saved = {
            slot: self._cast(tensor, dtype if tensor.is_floating_point() else from_torch(tensor.dtype), name)
            for slot, tensor in slots.items()
            if slot != "alpha"
        }
        rank = None
        if "alpha" in slots:
            rank = int(slots["alpha"].item())
            saved["alpha"] = alpha_tensor(float(rank), saved)
        return _Merged(saved, label, rank)

    def _cast(self, tensor: Tensor, stored: str, key: str) -> Tensor:
        dtype = saved_dtype(self._options.dtype, stored)
        saved = cast_checked(tensor, dtype, path="merged adapter", key=key)
        if saved.is_floating_point() and not saved.any() and tensor.any():
            self.warnings.append(f"{key}: underflow: every value rounds to 0 in {dtype}")
        return saved.to("cpu")

    def _layer(self, part: _Part) -> Layer | None:
        if self._layers is None:
            return None
        try:
            return self._layers.find(part.module.name)
        except AmbiguousNameError as error:
            raise IncompatibleError(str(error), path=part.adapter.path, key=part.module.name) from None

    def _base_weight(self, part: _Part) -> Tensor:
        layer = self._layer(part)
        if layer is None or self._base is None:
            raise IncompatibleError(
                f"matches no layer of the base {self._options.base}",
                path=part.adapter.path,
                key=part.module.name,
            )
        param: Param = layer.weight
        weight = self._base.tensor(param.key).to(self._device, torch.float32)
        return weight if param.rows is None else weight[slice(*param.rows)]

    def _shape(self, place: tuple[str, str], parts: Sequence[_Part]) -> Shape:
        """The layer's weight shape: from the base, from a part that tells it, or by its name."""
        layer = self._layer(parts[0])
        if layer is not None:
            return layer.weight.shape
        for part in parts:
            sizes = part.module.detected.sizes
            if isinstance(rest := sizes.get("rest"), tuple) and isinstance(out := sizes["out"], int):
                return (out, *rest)
        rows, columns = (
            next((size for part in parts if (size := outline(part.module)[axis]) is not None), None)
            for axis in (0, 1)
        )
        if rows is None or columns is None:
            raise IncompatibleError(
                "the adapters do not tell the layer's shape", key=parts[0].module.name, hint="add `--base`"
            )
        kernel = kernel_of(place, [part.module for part in parts])
        if columns % math.prod(kernel):
            kernel = ()
        return (rows, columns // math.prod(kernel), *kernel)


def _keeps_form(part: _Part) -> bool:
    """Whether a module alone at its place can be scaled without leaving its form."""
    if part.adapter.reading.loha_cp_shared_core and part.module.detected.layout.use_conv_cp:
        return False
    if part.weight == 1.0:
        return True
    return part.module.detected.dora_slot is None and bool(part.module.detected.layout.linear_in)


def _is_baseless(parts: Sequence[_Part]) -> bool:
    """Whether the sum can be written down without the base weight."""
    if len(parts) == 1 and _keeps_form(parts[0]):
        return True
    if not any(part.module.detected.needs_base for part in parts):
        return True
    first = parts[0].module.detected
    if first.algorithm.concat is None or any(part.module.detected.dora_slot for part in parts):
        return False
    if any(part.module.detected.layout is not first.layout for part in parts):
        return False
    if first.algorithm.name == "ia3":
        return len({(_on_input(part), _elements(part)) for part in parts}) == 1
    ranks = [part.module.dims.rank or 0 for part in parts]
    width = first.sizes.get("in")
    return not isinstance(width, int) or sum(ranks) < width


def _on_input(part: _Part) -> float:
    return part.adapter.store.scalar(part.module.keys["on_input"])


def _elements(part: _Part) -> int:
    return part.adapter.store.info(part.module.keys["weight"]).numel


def _metadata(
    adapters: Sequence[tuple[Adapter, float]], merged: Sequence[_Merged], options: MergeOptions
) -> dict[str, str]:
    """The first adapter's metadata (or all, or none), true for the result."""
    metadata: dict[str, str] = {}
    if options.metadata != "none":
        chosen = adapters if options.metadata == "union" else adapters[:1]
        for adapter, _ in chosen:
            metadata = {**adapter.store.metadata, **metadata}
        metadata = {key: value for key, value in metadata.items() if key not in STALE_METADATA}
    ranks = {result.rank for result in merged if result.rank is not None}
    labels = {result.label.split(" ")[0] for result in merged}
    if ranks:
        metadata["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        metadata["ss_network_alpha"] = metadata["ss_network_dim"]
    metadata |= network_arguments(metadata, labels)
    recipe = [{"file": Path(a.path).name, "strength": w} for a, w in adapters]
    return metadata | provenance("merge", json.dumps({"adapters": recipe, "rebuild": options.rebuild}))
