"""Several adapters to one adapter: planned layer by layer, written as it is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.errors import IncompatibleError
from lycotool.formats.keys import SPELLED
from lycotool.io.store import TensorStore
from lycotool.io.writer import FilePlan, TensorPlan, prepare_output, write_file
from lycotool.ops._common import AdapterReport, Progress, as_bytes, check_suffix, refuse_warnings
from lycotool.ops._merge_kohya import check_kohya, kohya_factors
from lycotool.ops._merge_options import MergeOptions
from lycotool.ops._merge_parts import Group, by_layer
from lycotool.ops._merge_verify import MergeVerification, MergeVerifier
from lycotool.ops._merger import Merged, Merger
from lycotool.ops._methods import Combination
from lycotool.ops._naming import NamingStyle
from lycotool.ops._origin import Origin
from lycotool.ops._render import STALE_METADATA, network_arguments
from lycotool.ops._strengths import Weighted
from lycotool.ops._truncate import Truncation

if TYPE_CHECKING:
    from torch import Tensor


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
    verified: MergeVerification | None = None


def merge_adapters(
    adapters: Sequence[Weighted],
    base_store: TensorStore | None,
    output: str,
    options: MergeOptions,
    combination: Combination,
    origin: Origin,
    progress: Progress,
) -> AdapterMergeResult:
    """Merge opened adapters into one, and write it.

    Raises
    ------
    IncompatibleError
        If they do not fit each other, or an algorithm needs a base that is not given.
    CheckError
        If verification finds that the file does not say what it must.
    """
    check_suffix(output)
    sources = [*(a.adapter.store for a in adapters), *([base_store] if base_store else [])]
    inputs = [path for source in sources for path in source.files]
    target = (
        None
        if output == "-" and options.dry_run
        else prepare_output(output, inputs=inputs, force=options.force)
    )
    warnings = [warning for a in adapters for warning in a.warnings]
    warnings += [note for a in adapters for note in a.adapter.notes]
    refuse_warnings(warnings, strict=options.strict)

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

    def file_of(modules: Sequence[tuple[Group, Merged]]) -> FilePlan:
        """The file that some modules make."""
        plans = {
            key: merged.plans[slot] for group, merged in modules for key, slot in names.keys(group, merged)
        }
        for key, store in embeddings.items():
            plans.setdefault(key, TensorPlan(store.info(key).dtype, store.info(key).shape))
        metadata = _metadata(adapters, [m for _, m in modules], options) | origin.metadata()
        return FilePlan(plans, metadata, hashed=True, settle=origin.settled)

    total = sum(group.nbytes for group in groups)
    truncation = None
    if options.compat == "kohya":
        check_kohya(groups, concat=options.concat)
    if options.ranks.truncates:
        progress.start("merge", 2 * total)
        truncation = Truncation(merger, options.ranks)
        modules = truncation.merge(
            groups, size_of=lambda some: file_of(some).nbytes, path=output, advance=progress.advance
        )
    else:
        progress.start("merge", total)
        modules = []
        for group in groups:
            kohya = kohya_factors(group, merger, concat=options.concat) if options.compat == "kohya" else None
            modules.append((group, merger.merge(group) if kohya is None else merger.as_stored(group, *kohya)))
            progress.advance(group.nbytes)
    refuse_warnings(merger.underflow.warnings(), strict=options.strict)
    plan = file_of(modules)
    verified = None
    if not options.dry_run:
        origin.begin()
        produce = _Producer(
            {key: (merged, slot) for group, merged in modules for key, slot in names.keys(group, merged)},
            embeddings,
        )
        verifier = None
        if options.verify:
            verifier = MergeVerifier(merger, options, names.name, modules, truncation, progress)
        write_file(target, plan, produce, check=None if verifier is None else verifier.check)
        verified = None if verifier is None else verifier.result()
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
        warnings=(*warnings, *merger.underflow.warnings()),
        dry_run=options.dry_run,
        relative_error=None if truncation is None else truncation.relative_error,
        verified=verified,
    )


class _Names:
    """The keys of the result, in the spelling of its first adapter."""

    def __init__(self, adapters: Sequence[Weighted], output: str) -> None:
        self._style = NamingStyle(adapters[0].adapter.modules)
        self._slots = SPELLED[adapters[0].adapter.keys.spelling]
        self._output = output
        self._owners: dict[str, tuple[str, str]] = {}

    def name(self, group: Group) -> str:
        """The layer's name."""
        return self._style.rename(group.name, path=group.parts[0].adapter.path)

    def keys(self, group: Group, merged: Merged) -> Iterable[tuple[str, str]]:
        """Key and slot of each tensor of a module.

        Raises
        ------
        IncompatibleError
            If another layer has such a key.
        """
        name = self.name(group)
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
    return metadata | network_arguments(metadata, labels)
