"""merge: a checkpoint and adapters to a checkpoint, or adapters to one adapter.

A method combines the changes ``wᵢ·ΔWᵢ`` (never factors) to one: by default their sum, else
one of :mod:`lycotool.linalg.merging`, layer by layer. Into a checkpoint the combined change
is added (see :mod:`lycotool.ops.bake`). Adapters become one adapter. Its layers are, for the
sum, in the form that stays smallest:

1. a module of one adapter alone keeps its algorithm, its weight folded into one factor;
2. algorithms closed under addition keep their form (full, norm, (IA)³ of one axis, GLoRA);
3. whatever has exact low-rank factors becomes a LoRA of the summed ranks, with a CP core
   when all parts have one (LoHa by Khatri-Rao, LoKr by Kronecker products);
4. the rest becomes a full difference, from the base weight where an algorithm needs it.

Other methods give full differences. A rank, size or error makes LoRA factors of either.
Full differences are computed when the writer asks for them, so that memory is that of the
largest layer, not of the model. The registry's merge rules are obeyed unless ``rebuild``
overrides them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lycotool.errors import IncompatibleError, RefusedError, UsageError
from lycotool.formats.keys import SPELLED
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
from lycotool.ops._merge_parts import Group, by_layer
from lycotool.ops._merger import Merged, Merger
from lycotool.ops._methods import Combination, MethodOptions, resolve
from lycotool.ops._naming import NamingStyle
from lycotool.ops._quantised import dequantised
from lycotool.ops._render import STALE_METADATA, network_arguments
from lycotool.ops._strengths import StrengthOptions, Weighted, weigh
from lycotool.ops._truncate import RankOptions, Truncation
from lycotool.ops.bake import BakeOptions, BakeResult, fold, open_adapters

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions(BakeOptions):
    """What `merge` has beside the common options.

    ``rebuild`` overrides the registry's rules. ``base`` is a checkpoint for algorithms whose
    change depends on it. ``metadata`` says whose metadata an adapter merge keeps; None is
    ``first``.
    """

    rebuild: bool = False
    base: str | None = None
    metadata: Literal["first", "union", "none"] | None = None
    method: MethodOptions = field(default_factory=MethodOptions)
    ranks: RankOptions = field(default_factory=RankOptions)


@dataclass(frozen=True, slots=True)
class AdapterMergeResult:
    """The adapter that was written, or would be.

    ``relative_error`` is what truncation left out of the combined change; None where nothing
    was truncated.
    """

    output: str
    method: str
    modules: int
    algorithms: dict[str, int]
    tensors: int
    nbytes: int
    adapters: tuple[AdapterReport, ...]
    warnings: tuple[str, ...]
    dry_run: bool
    relative_error: float | None = None


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
    UsageError
        If options do not go together, or there is nothing to merge.
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
        named = [base, *adapters] if into_adapter else adapters
        combination = resolve(options.method, named, truncated=options.ranks.truncates)
        options.ranks.check()
        for weighted in opened:
            if not options.rebuild:
                _obey_rules(weighted.adapter)
        ending = "" if store.kind == "diffusers" else ".safetensors"
        name = options.output or default_name([base.path, *(a.path for a in adapters)], ending)
        if not into_adapter:
            _refuse_adapter_options(options)
            return fold(
                store, opened, name, options, command="merge", progress=progress, combination=combination
            )
        _refuse_checkpoint_options(options)
        base_store = None
        if options.base is not None:
            base_store = files.enter_context(open_store(options.base, allow_pickle=options.allow_pickle))
            base_store = dequantised(base_store)
        return _merge_adapters(opened, base_store, name, options, combination, progress)


def _is_idle(base: AdapterInput, options: MergeOptions) -> bool:
    """Whether an adapter alone would come out as it went in."""
    plain = base == AdapterInput(base.path) and options.strengths == StrengthOptions()
    return plain and options.method == MethodOptions() and not options.ranks.truncates


def _refuse_adapter_options(options: MergeOptions) -> None:
    """Refuse what only means something when the result is an adapter.

    Raises
    ------
    UsageError
        Naming the first such option.
    """
    given = {
        "--rank, --conv-rank, --size and --error": options.ranks.truncates,
        "--base": options.base is not None,
        "--metadata": options.metadata is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(
                f"{name} are for a result that is an adapter; BASE is a checkpoint here"
                if "," in name
                else f"{name} is for a result that is an adapter; BASE is a checkpoint here"
            )


def _refuse_checkpoint_options(options: MergeOptions) -> None:
    """Refuse what only means something when the result is a checkpoint.

    Raises
    ------
    UsageError
        Naming the first such option.
    """
    given = {
        "--shard-size": options.shard_size is not None,
        "--vae": options.vae is not None,
        "--verify": options.verify,
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name} is for a result that is a checkpoint; BASE is an adapter here")


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
    combination: Combination,
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

    first = adapters[0].adapter
    groups = by_layer(adapters)
    merger = Merger(
        options,
        base_store,
        combination,
        spelling=first.keys.spelling,
        in_one_form=combination.is_dense or options.ranks.truncates,
    )
    merger.check(groups)
    embeddings = {key: a.adapter.store for a in reversed(adapters) for key in a.adapter.keys.embeddings}
    names = _Names(adapters, output)
    relative_error = None

    def file_of(modules: Sequence[tuple[Group, Merged]]) -> FilePlan:
        """The file that some modules make."""
        plans = {
            key: merged.plans[slot] for group, merged in modules for key, slot in names.keys(group, merged)
        }
        for key, store in embeddings.items():
            plans.setdefault(key, TensorPlan(store.info(key).dtype, store.info(key).shape))
        return FilePlan(
            plans, _metadata(adapters, [m for _, m in modules], options, combination), hashed=True
        )

    total = sum(group.nbytes for group in groups)
    if options.ranks.truncates:
        progress.start("merge", 2 * total)
        truncation = Truncation(merger, options.ranks)
        modules = truncation.merge(
            groups, size_of=lambda some: file_of(some).nbytes, path=output, advance=progress.advance
        )
        relative_error = truncation.relative_error
    else:
        progress.start("merge", total)
        modules = []
        for group in groups:
            modules.append((group, merger.merge(group)))
            progress.advance(group.nbytes)
    plan = file_of(modules)
    if not options.dry_run:
        produce = _Producer(
            {key: (merged, slot) for group, merged in modules for key, slot in names.keys(group, merged)},
            embeddings,
        )
        write_file(target, plan, produce)
    labels: dict[str, int] = {}
    for _, merged in modules:
        labels[merged.label] = labels.get(merged.label, 0) + 1
    return AdapterMergeResult(
        output=output,
        method=combination.method.name,
        modules=len(modules),
        algorithms=labels,
        tensors=len(plan.tensors),
        nbytes=plan.nbytes,
        adapters=tuple(weighted.report for weighted in adapters),
        warnings=(*warnings, *merger.warnings),
        dry_run=options.dry_run,
        relative_error=relative_error,
    )


class _Names:
    """The keys of the result, in the spelling of its first adapter."""

    def __init__(self, adapters: Sequence[Weighted], output: str) -> None:
        self._style = NamingStyle(adapters[0].adapter.modules)
        self._slots = SPELLED[adapters[0].adapter.keys.spelling]
        self._output = output
        self._owners: dict[str, tuple[str, str]] = {}

    def keys(self, group: Group, merged: Merged) -> Iterable[tuple[str, str]]:
        """Key and slot of each tensor of a module.

        Raises
        ------
        IncompatibleError
            If another layer has such a key.
        """
        name = self._style.rename(group.name, path=group.parts[0].adapter.path)
        for slot in merged.plans:
            key = f"{name}.{self._slots.get(slot, slot)}"
            if self._owners.setdefault(key, group.place) != group.place:
                raise IncompatibleError(
                    "two layers of the inputs would get this name", path=self._output, key=key
                )
            yield key, slot


class _Producer:
    """Gives the writer each tensor's bytes; holds one module's tensors at a time."""

    def __init__(
        self, owners: Mapping[str, tuple[Merged, str]], embeddings: Mapping[str, TensorStore]
    ) -> None:
        self._owners = owners
        self._embeddings = embeddings
        self._made: tuple[Merged, Mapping[str, Tensor]] | None = None

    def __call__(self, key: str) -> Iterable[memoryview]:
        if key not in self._owners:
            return self._embeddings[key].chunks(key)
        merged, slot = self._owners[key]
        if self._made is None or self._made[0] is not merged:
            self._made = None  # let go of the last one before the next is computed
            self._made = merged, merged.make()
        return [as_bytes(self._made[1][slot])]


def _metadata(
    adapters: Sequence[Weighted],
    merged: Sequence[Merged],
    options: MergeOptions,
    combination: Combination,
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
