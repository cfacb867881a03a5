"""Fold opened adapters into an opened checkpoint: what `bake` and `merge` share.

The work is divided into what is to change (:mod:`lycotool.ops._bake_plan`), the tensors
(:mod:`lycotool.ops._bake_tensors`), the files they go to (:mod:`lycotool.ops._bake_files`) and
their verification (:mod:`lycotool.ops._bake_verify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from lycotool.devices import resolve_device
from lycotool.errors import UsageError
from lycotool.io.hashes import LEGACY_HASH, MODEL_HASH
from lycotool.io.open import open_component, open_store
from lycotool.io.shards import stem_of
from lycotool.io.store import TensorStore
from lycotool.io.writer import TensorPlan, Written
from lycotool.ops._adapter import AdapterInput, read_adapter
from lycotool.ops._align import aligned
from lycotool.ops._bake_combined import CombinedEdits
from lycotool.ops._bake_files import Contents, Layout, lay_out, prepare, write
from lycotool.ops._bake_metadata import checkpoint_metadata, file_sha256, has_spec, origin
from lycotool.ops._bake_plan import Plan, make_plan
from lycotool.ops._bake_tensors import Baker, Source
from lycotool.ops._bake_verify import Verification, Verifier
from lycotool.ops._common import (
    AdapterReport,
    Progress,
    WriteOptions,
    saved_dtype,
)
from lycotool.ops._methods import Combination
from lycotool.ops._origin import Origin
from lycotool.ops._quantised import dequantised, packed_in, require_readable, scaled_in
from lycotool.ops._strengths import StrengthOptions, Weighted, weigh
from lycotool.ops._vae import with_vae

#: The layer, its change, LoHa's two halves and their product, and the rounded result.
_FLOAT32_COPIES = 6

#: What a merge method holds of each adapter beside that: its change, the same pruned, and a mask.
_COPIES_PER_ADAPTER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeOptions(WriteOptions):
    """What `bake` has beside the common options.

    ``unbake`` takes adapters out of a checkpoint again that were folded into it. ``shard_size``
    is the most bytes of data in one file of a sharded output. ``vae`` is a file whose VAE
    replaces the checkpoint's. ``verify`` reads the output and compares it with the inputs
    before it gets its name.
    """

    unbake: bool = False
    shard_size: int | None = None
    vae: str | None = None
    verify: bool = False
    strengths: StrengthOptions = field(default_factory=StrengthOptions)


@dataclass(frozen=True, slots=True)
class Float8Rounding:
    """What storing as float8 lost: absolute errors, and values beyond the range of their scale."""

    max_error: float
    mean_error: float
    saturated: int


@dataclass(frozen=True, slots=True)
class BakeResult:
    """What was written, or would be.

    ``reconstruction_error`` is what an unbaked weight can be off by, absolutely: rounding
    when it was baked, and now. None where nothing was unbaked or written. ``rounding`` is of
    the float8 weights that were not copied, None where there are none. ``files`` counts the
    files of weights.
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
    files: int = 1
    rounding: Float8Rounding | None = None
    verified: Verification | None = None


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
    numbers = None if checkpoint is None else dequantised(checkpoint)
    for named in adapters:
        store = files.enter_context(open_store(named.path, allow_pickle=options.allow_pickle))
        adapter = read_adapter(store, reading=options.reading)
        adapter.require_sound()
        if numbers is not None:
            adapter = aligned(adapter, numbers)
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
    combination: Combination | None = None,
    origin_of_merge: Origin | None = None,
    title: str | None = None,
) -> BakeResult:
    """Fold opened adapters into an opened checkpoint; what `bake` and `merge` share.

    Parameters
    ----------
    combination
        How the adapters' changes of one layer become one; None is their sum.
    origin_of_merge
        What the metadata says the result was made from; None is what `bake` says.
    title
        The result's ``modelspec.title``; None is the output's name.
    """
    with ExitStack() as files:
        inputs = [path for source in (store, *(a.adapter.store for a in adapters)) for path in source.files]
        changed = store
        if options.vae is not None:
            vae = files.enter_context(open_component(options.vae, allow_pickle=options.allow_pickle))
            inputs += vae.files
            changed = with_vae(store, vae)
        target = prepare(store, output, inputs, options.shard_size, force=options.force, dry=options.dry_run)
        source, plan = _plan(changed, adapters, options)
        copies = _FLOAT32_COPIES
        if combination is not None and combination.is_dense:
            source = replace(source, combined=CombinedEdits(adapters, combination))
            copies += _COPIES_PER_ADAPTER * len(adapters)
        contents = _contents(
            store, source, adapters, title or title_of(output, store), options, command, origin_of_merge
        )
        if title is not None and not has_spec(contents.metadata):
            raise UsageError("--title is modelspec.title, and this checkpoint's metadata have no modelspec")
        layout = lay_out(target, output, store, contents, options.shard_size)
        edited = [source.store.info(key).numel for key in source.plans if not source.is_copied(key)]
        result = BakeResult(
            output=layout.output,
            checkpoint=store.path,
            tensors=len(source.plans),
            changed=len(source.edits),
            nbytes=sum(tensor.nbytes for tensor in source.plans.values()),
            peak_bytes=copies * (8 if options.verify else 4) * max(edited, default=0),
            adapters=plan.reports,
            warnings=plan.warnings,
            dry_run=options.dry_run,
            files=len(layout.files),
        )
        return result if options.dry_run else _write(source, layout, result, options, command, progress)


def _plan(store: TensorStore, adapters: Sequence[Weighted], options: BakeOptions) -> tuple[Source, Plan]:
    """What is to be written, before any tensor is read."""
    scaled = scaled_in(store)
    numbers = dequantised(store, scaled)
    plan = make_plan(numbers, adapters, sign=-1.0 if options.unbake else 1.0, strict=options.strict)
    converted = [] if options.dtype == "keep" else [*scaled, *packed_in(store)]
    for key in dict.fromkeys([*plan.edits, *converted]):
        require_readable(store, scaled, key)
    kept = store if options.dtype == "keep" else numbers
    plans = {
        key: TensorPlan(saved_dtype(options.dtype, entry.info.dtype), entry.info.shape)
        for key, entry in kept.entries.items()
    }
    return Source(kept, numbers, scaled if kept is store else {}, plan.edits, plans), plan


def _contents(
    store: TensorStore,
    source: Source,
    adapters: Sequence[Weighted],
    title: str,
    options: BakeOptions,
    command: str,
    origin_of_merge: Origin | None,
) -> Contents:
    if origin_of_merge is not None:
        origin_of_merge.begin(store)
        hashes = [origin_of_merge.sha256(weighted.adapter.store) for weighted in adapters]
    else:
        hashes = ["" if options.dry_run else file_sha256(weighted.adapter) for weighted in adapters]
    merged = [(Path(a.adapter.path).stem, sha256) for a, sha256 in zip(adapters, hashes, strict=True)]
    metadata = checkpoint_metadata(
        source.store, title, [] if options.unbake else merged, keeps_dtypes=options.dtype == "keep"
    )
    if origin_of_merge is not None:
        if has_spec(metadata):  # else nothing depends on the title, which is the output's name
            origin_of_merge = origin_of_merge.with_value("title", title)
        made = origin_of_merge.metadata()
    else:
        more: dict[str, object] = {"unbake": True} if options.unbake else {}
        if options.vae is not None:
            more["vae"] = Path(options.vae).name
        made = origin(command, store, adapters, hashes, **more)
    return Contents(
        plans=source.plans,
        metadata=metadata | made,
        provenance=made,
        changed=frozenset(source.edits),
        late=frozenset(source.changed_scales),
        scaled=source.scaled,
        dequantised=frozenset(scaled_in(store)) - source.scaled.keys(),
        hashed=bool({MODEL_HASH, LEGACY_HASH} & store.metadata.keys()),
        spec_hashed=has_spec(metadata),
        settle=None if origin_of_merge is None else origin_of_merge.settled,
    )


def _write(
    source: Source,
    layout: Layout,
    result: BakeResult,
    options: BakeOptions,
    command: str,
    progress: Progress,
) -> BakeResult:
    hashed = options.verify or any(file.plan.hashed or file.plan.spec_hashed for file in layout.files)
    device = resolve_device(options.device)
    baker = Baker(source, device, options.unbake, options.strict, by_system=not hashed)
    verifier = None
    if options.verify:
        device = resolve_device(options.device, float64=True)
        verifier = Verifier(source, device, baker.scales, progress)
    keys = {id(file.plan): file.keys for file in layout.files}

    def check(written: Written) -> None:
        if verifier is not None:
            verifier.check(written, keys[id(written.plan)])

    progress.start(command, result.nbytes * (2 if options.verify else 1))
    order = [file.keys[name] for file in layout.files for name, _ in file.plan.in_turn()]
    with baker.reading_ahead(order):
        write(layout, baker.produce, progress.advance, check if options.verify else None)
    rounding = baker.rounding
    return replace(
        result,
        warnings=(*result.warnings, *baker.underflow.warnings()),
        reconstruction_error=baker.reconstruction_error if options.unbake else None,
        rounding=Float8Rounding(rounding.largest, rounding.mean, rounding.saturated)
        if rounding.count
        else None,
        verified=None if verifier is None else verifier.result(),
    )


def title_of(output: str, store: TensorStore) -> str:
    """The new checkpoint's name: the file's, or the old one's where the file has none."""
    return stem_of(Path(store.path if output == "-" else output).name)
