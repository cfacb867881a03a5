"""bake: fold adapters of any algorithm into a checkpoint, one tensor at a time.

``W' = W + Σ sᵢ·ΔWᵢ``, every ``ΔWᵢ`` taken on the original ``W``, in float32, rounded once.
Tensors no adapter touches are copied byte for byte. Memory is that of the largest layer
(at most six float32 copies of it), whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms.base import MismatchError
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError, LycotoolError
from lycotool.io.dtypes import FLOATING, to_torch
from lycotool.io.hashes import LEGACY_HASH, MODEL_HASH
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.io.tree import TreeTarget, prepare_tree, write_tree
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.lazy import torch
from lycotool.linalg.finite import extremes
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex, Param
from lycotool.ops._adapter import Adapter, AdapterInput, AdapterModule, is_adapter, read_adapter
from lycotool.ops._align import aligned
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
    refuse_scaled,
    saved_dtype,
)
from lycotool.ops._render import STALE_METADATA
from lycotool.ops._strengths import StrengthOptions, Weighted, weigh

if TYPE_CHECKING:
    from torch import Tensor


#: The layer, its change, LoHa's two halves and their product, and the rounded result.
_FLOAT32_COPIES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeOptions(WriteOptions):
    """What `bake` has beside the common options.

    ``unbake`` takes adapters out of a checkpoint again that were folded into it.
    """

    unbake: bool = False
    strengths: StrengthOptions = field(default_factory=StrengthOptions)


@dataclass(frozen=True, slots=True)
class BakeResult:
    """What was written, or would be.

    ``reconstruction_error`` is what an unbaked weight can be off by, absolutely: rounding
    when it was baked, and now. None where nothing was unbaked or written.
    """

    output: str
    checkpoint: str
    tensors: int
    changed: int
    nbytes: int
    peak_bytes: int
    adapters: tuple[AdapterReport, ...]
    warnings: tuple[str, ...]
    dry_run: bool
    reconstruction_error: float | None = None


@dataclass(frozen=True, slots=True)
class _Edit:
    """One module's change to one checkpoint tensor."""

    adapter: Adapter
    module: AdapterModule
    part: Literal["weight", "bias"]
    param: Param
    strength: float


def bake(
    checkpoint: str,
    adapters: Sequence[AdapterInput],
    options: BakeOptions,
    *,
    progress: Progress | None = None,
) -> BakeResult:
    """Fold ``adapters`` into ``checkpoint``.

    Parameters
    ----------
    checkpoint
        A ``.safetensors`` file, a sharded index, a diffusers folder or ``-``.
    adapters
        With their strengths; all refer to the original weights.

    Raises
    ------
    IncompatibleError
        If the checkpoint is an adapter, no module matches, or shapes do not fit.
    LycotoolError
        As the readers and writers it uses say.
    """
    with ExitStack() as files:
        store = files.enter_context(open_store(checkpoint, allow_pickle=options.allow_pickle))
        if is_adapter(store):
            raise IncompatibleError(
                "this is an adapter, `bake` needs a checkpoint to fold adapters into",
                path=checkpoint,
                hint="`lycotool merge` adds adapters to an adapter",
            )
        opened = open_adapters(adapters, options, files, store)
        if options.unbake:
            _require_additive(opened)
        done = "-unbaked" if options.unbake else "-baked"
        name = options.output or default_name([checkpoint], done + _ending(store))
        return fold(store, opened, name, options, command="bake", progress=progress or NoProgress())


def _require_additive(adapters: Sequence[Weighted]) -> None:
    """Refuse to take out changes that depended on the weights before.

    Raises
    ------
    IncompatibleError
        Naming every such module.
    """
    for weighted in adapters:
        modules = weighted.adapter.modules.values()
        dependent = [f"{m.name}: {m.detected.label}" for m in modules if m.detected.needs_base]
        if dependent:
            raise IncompatibleError(
                f"{len(dependent)} modules changed the weight by an amount that depended on it",
                path=weighted.adapter.path,
                details=listed(dependent),
                hint="only the checkpoint from before has those weights",
            )


def open_adapters(
    adapters: Sequence[AdapterInput],
    options: BakeOptions,
    files: ExitStack,
    checkpoint: TensorStore | None = None,
) -> list[Weighted]:
    """Open adapters for as long as ``files`` is; each with its strengths.

    Parameters
    ----------
    checkpoint
        What they are folded into, whose naming they are brought into.

    Raises
    ------
    LycotoolError
        If a file cannot be read, is damaged, or block weights do not fit it.
    """
    opened = []
    for named in adapters:
        store = files.enter_context(open_store(named.path, allow_pickle=options.allow_pickle))
        adapter = read_adapter(store, reading=options.reading)
        adapter.require_sound()
        if checkpoint is not None:
            adapter = aligned(adapter, checkpoint)
        opened.append(weigh(adapter, named, options.strengths))
    return opened


def fold(
    store: TensorStore,
    adapters: Sequence[Weighted],
    output: str,
    options: BakeOptions,
    *,
    command: str,
    progress: Progress,
) -> BakeResult:
    """Fold opened adapters into an opened checkpoint; what `bake` and `merge` share."""
    inputs = [path for source in (store, *(a.adapter.store for a in adapters)) for path in source.files]
    target = _prepare(store, output, inputs, options)
    index = LayerIndex(store.shapes)
    edits: dict[str, list[_Edit]] = {}
    sign = -1.0 if options.unbake else 1.0
    reports = tuple(_match(weighted, sign, index, edits, store) for weighted in adapters)
    warnings = [warning for a in adapters for warning in a.adapter.warnings]
    warnings += store.warnings
    warnings += _check_matches(reports, options.strict)
    if options.strict and warnings:
        raise IncompatibleError("`--strict` makes warnings errors", details=warnings)
    warnings += [note for a in adapters for note in a.adapter.notes]
    _check_editable(store, edits)

    plans = {
        key: TensorPlan(saved_dtype(options.dtype, entry.info.dtype), entry.info.shape)
        for key, entry in store.entries.items()
    }
    recipe = [weighted.recipe for weighted in adapters]
    metadata = {k: v for k, v in store.metadata.items() if k not in STALE_METADATA}
    made = {"base": Path(store.path).name, "adapters": recipe} | ({"unbake": True} if options.unbake else {})
    metadata |= provenance(command, json.dumps(made))
    hashed = bool({MODEL_HASH, LEGACY_HASH} & store.metadata.keys())
    result = BakeResult(
        output=output,
        checkpoint=store.path,
        tensors=len(plans),
        changed=len(edits),
        nbytes=sum(plan.nbytes for plan in plans.values()),
        peak_bytes=_FLOAT32_COPIES * 4 * max((store.info(key).numel for key in edits), default=0),
        adapters=reports,
        warnings=tuple(warnings),
        dry_run=options.dry_run,
    )
    if options.dry_run:
        return result
    device = resolve_device(options.device)
    error = 0.0

    def produce(key: str) -> Iterable[memoryview]:
        stored = store.info(key).dtype
        if key not in edits and plans[key].dtype == stored:
            return store.chunks(key)
        tensor = _edited(store, key, edits.get(key, ()), device)
        if options.unbake and key in edits:
            nonlocal error
            error = max(
                error, _rounding(store.tensor(key)) + _rounding(tensor.to(to_torch(plans[key].dtype)))
            )
        return [as_bytes(cast_checked(tensor, plans[key].dtype, path=store.path, key=key))]

    progress.start(command, result.nbytes)
    if isinstance(target, TreeTarget):
        write_tree(target, store, plans, produce, advance=progress.advance)
    else:
        write_file(target, FilePlan(plans, metadata, hashed), produce, advance=progress.advance)
    return replace(result, reconstruction_error=error) if options.unbake else result


def _rounding(tensor: Tensor) -> float:
    """The most that rounding to its dtype can have moved an element."""
    return torch.finfo(tensor.dtype).eps / 2 * max(map(abs, extremes(tensor.float())))


def _ending(store: TensorStore) -> str:
    """A diffusers folder gives a folder, anything else one file."""
    return "" if store.kind == "diffusers" else ".safetensors"


def _prepare(
    store: TensorStore, output: str, inputs: Sequence[Path], options: WriteOptions
) -> Path | TreeTarget | None:
    if store.kind == "diffusers":
        return prepare_tree(output, Path(store.path), force=options.force)
    check_suffix(output)
    if options.dry_run and output == "-":
        return None
    return prepare_output(output, inputs=inputs, force=options.force)


def _match(
    weighted: Weighted, sign: float, index: LayerIndex, edits: dict[str, list[_Edit]], store: TensorStore
) -> AdapterReport:
    """Find each module's layer, check that it fits, and note the edits.

    Raises
    ------
    IncompatibleError
        Listing every module that does not fit its layer.
    """
    adapter = weighted.adapter
    unmatched: list[str] = []
    faults: list[LycotoolError] = []
    taken: dict[tuple[str, tuple[int, int] | None], str] = {}
    for module in adapter.modules.values():
        try:
            layer = index.find(module.name)
            if layer is None:
                unmatched.append(module.name)
                continue
            place = (layer.weight.key, layer.weight.rows)
            if (other := taken.setdefault(place, module.name)) != module.name:
                raise MismatchError(f"changes the same layer as {other}")
            module.detected.check_fits(layer.weight.shape)
            found = _edits_of(adapter, module, layer, sign * weighted.of(module.name))
        except (AmbiguousNameError, MismatchError) as error:
            faults.append(IncompatibleError(str(error), path=adapter.path, key=module.name))
            continue
        for edit in found:
            if edit.strength != 0:  # the rest of the tensor is copied byte for byte
                edits.setdefault(edit.param.key, []).append(edit)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise IncompatibleError(
            f"{len(faults)} modules do not fit {store.path}",
            path=adapter.path,
            details=[f"{fault.key}: {fault.message}" for fault in faults],
        )
    return AdapterReport(
        path=adapter.path,
        strength=weighted.strength,
        modules=len(adapter.modules),
        matched=len(adapter.modules) - len(unmatched),
        unmatched=tuple(unmatched),
        algorithms=count_labels(adapter),
    )


def _edits_of(adapter: Adapter, module: AdapterModule, layer: Layer, strength: float) -> list[_Edit]:
    edits = [_Edit(adapter, module, "weight", layer.weight, strength)]
    bias_slots = [slot for slot in ("diff_b", "b_norm", "lora_up.bias") if slot in module.keys]
    if not bias_slots:
        return edits
    if layer.bias is not None:
        return [*edits, _Edit(adapter, module, "bias", layer.bias, strength)]
    for slot in bias_slots:  # LyCORIS writes zeros for layers without a bias
        if adapter.store.tensor(module.keys[slot]).float().abs().max() > 0:
            raise MismatchError(f"{slot} changes a bias, but {layer.path} has none")
    return edits


def _check_matches(reports: Sequence[AdapterReport], strict: bool) -> list[str]:
    """Zero matches are an error; unmatched modules are one with ``--strict``."""
    warnings = []
    for report in reports:
        if report.matched == 0:
            raise IncompatibleError(
                f"0 of {report.modules} modules match a layer of the checkpoint",
                path=report.path,
                details=listed(report.unmatched),
                hint="is the adapter for another model, or named for another program? `lycotool inspect` says, "
                "`lycotool convert` renames",
            )
        if report.unmatched:
            message = f"{len(report.unmatched)} of {report.modules} modules match no layer"
            if strict:
                raise IncompatibleError(message, path=report.path, details=report.unmatched)
            warnings.append(f"{report.path}: {message}: {', '.join(listed(report.unmatched))}")
    return warnings


def _check_editable(store: TensorStore, edits: Mapping[str, object]) -> None:
    for key in edits:
        dtype = store.info(key).dtype
        if dtype not in FLOATING:
            raise IncompatibleError(
                f"is stored as {dtype}; a quantised weight cannot be changed exactly",
                path=store.path,
                key=key,
            )
        refuse_scaled(store, key)


def _edited(store: TensorStore, key: str, edits: Sequence[_Edit], device: torch.device) -> Tensor:
    """``W + Σ s·ΔW`` of one checkpoint tensor, in float32 (float64 if it is stored so)."""
    stored = store.tensor(key)
    if not edits:
        return stored
    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    base = stored.to(device=device, dtype=dtype)
    keep_base = len(edits) > 1 and any(edit.module.detected.needs_base for edit in edits)
    total = base.clone() if keep_base else base
    for edit in edits:
        change = _change(edit, base, dtype)
        if change is not None:
            edit.param.view(total).add_(change)
    return total


def _change(edit: _Edit, base: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One module's change of (its rows of) a weight or bias."""
    bound = edit.adapter.load(edit.module, base.device, dtype)
    if edit.part == "bias":
        return bias_change(edit.module.detected, bound, strength=edit.strength)
    part = edit.param.view(base)
    try:
        return weight_change(edit.module.detected, bound, edit.param.shape, part, strength=edit.strength)
    except MismatchError as error:
        raise IncompatibleError(str(error), path=edit.adapter.path, key=edit.module.name) from None
