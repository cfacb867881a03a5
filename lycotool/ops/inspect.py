"""inspect: what files are and how strong, from their headers and, where asked, their tensors.

Reading headers imports no torch; :attr:`InspectOptions.stats`, ``check`` and ``compare`` do.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms.base import DEFAULT_READING, Reading
from lycotool.errors import IncompatibleError, LycotoolError
from lycotool.formats.keys import dialects
from lycotool.io.open import exists, open_store
from lycotool.io.store import SafetensorsFile, TensorStore
from lycotool.models.architecture import guess_architecture, guess_checkpoint
from lycotool.models.naming import split_path
from lycotool.ops._adapter import Adapter, is_adapter, read_adapter
from lycotool.ops._common import NoProgress, Progress, refuse_warnings
from lycotool.ops._inspect_rows import (
    COMPONENT_NAMES,
    AlgorithmRow,
    BlockRow,
    HashRow,
    LoaderRow,
    ModuleRow,
    algorithm_rows,
    block_rows,
    component_of,
    count,
    hash_rows,
    loader_rows,
    module_row,
    widths_of,
)
from lycotool.ops._metadata_keys import JSON_KEYS

if TYPE_CHECKING:
    from lycotool.ops._findings import Finding
    from lycotool.ops._inspect_compare import Comparison
    from lycotool.ops._inspect_stats import Stats
    from lycotool.ops._inspect_tags import TagRow

#: Metadata shown in the summary, in this order.
_SUMMARY_KEYS = (
    "modelspec.title", "modelspec.architecture", "modelspec.author", "modelspec.trigger_phrase",
    "ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_learning_rate", "ss_unet_lr",
    "ss_text_encoder_lr", "ss_lr_scheduler", "ss_optimizer", "ss_steps", "ss_epoch",
    "ss_num_train_images", "ss_resolution", "ss_clip_skip", "ss_training_comment",
    "sshs_model_hash", "lycotool.version",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """What to look at beside names and shapes.

    Attributes
    ----------
    modules
        Describe every module.
    blocks
        Count modules by the block of the model they are in.
    hashes
        Read the whole file for its hashes.
    tags
        Count the tags of the captions it was trained on.
    stats
        Measure the change of every module.
    check
        Look for faults: ``"header"`` reads no tensor, ``"all"`` reads the file and measures it.
    compare
        Another adapter to put beside this one.
    base
        A checkpoint whose weights the changes are compared with; algorithms whose change
        depends on them need it.
    device
        Where changes are measured; see :func:`lycotool.devices.resolve_device`.
    strict
        Make warnings errors.
    """

    modules: bool = False
    blocks: bool = False
    hashes: bool = False
    tags: bool = False
    stats: bool = False
    check: Literal["none", "header", "all"] = "none"
    compare: str | None = None
    base: str | None = None
    device: str = "auto"
    allow_pickle: bool = False
    strict: bool = False
    reading: Reading = DEFAULT_READING


@dataclass(frozen=True, slots=True)
class InspectReport:
    """Everything `inspect` knows of one file; what was not asked for is None."""

    path: str
    kind: Literal["adapter", "checkpoint", "empty"]
    bytes: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    architecture: str
    architecture_evidence: str
    dialects: list[str]
    components: dict[str, int]
    algorithms: list[AlgorithmRow]
    loaders: list[LoaderRow]
    module_count: int
    metadata: dict[str, object]
    metadata_summary: dict[str, object]
    warnings: list[str]
    faults: list[str]
    modules: list[ModuleRow] | None = None
    hashes: list[HashRow] | None = None
    blocks: list[BlockRow] | None = None
    tags: list[TagRow] | None = None
    stats: Stats | None = None
    comparison: Comparison | None = None
    findings: list[Finding] | None = None


def inspect(
    name: str, options: InspectOptions | None = None, *, progress: Progress | None = None
) -> InspectReport:
    """Describe one file, PEFT folder, sharded index or diffusers folder.

    Raises
    ------
    UsageError
        If the device does not exist.
    IncompatibleError
        If there is nothing to compare.
    LycotoolError
        If the file cannot be read. Faults of single modules are part of the report.
    """
    options = options or InspectOptions()
    progress = progress or NoProgress()
    with open_store(name, allow_pickle=options.allow_pickle) as store, ExitStack() as files:
        adapter = read_adapter(store, reading=options.reading) if is_adapter(store) else None
        report = _report(store, adapter)
        values: Sequence[Finding] = ()
        refuse_warnings(report.warnings, strict=options.strict, path=name)
        base = None
        if options.base is not None and adapter is not None:
            base = files.enter_context(open_store(options.base, allow_pickle=options.allow_pickle))
        if options.hashes or options.check == "all":
            values = _read_once(store, adapter, check=options.check == "all")
            report = replace(report, hashes=hash_rows(store))
        if options.tags:
            from lycotool.ops._inspect_tags import tag_rows

            report = replace(report, tags=tag_rows(report.metadata))
        if options.modules and adapter is not None:
            report = replace(report, modules=[module_row(m, adapter) for m in adapter.modules.values()])
        if (options.stats or options.check == "all") and adapter is not None:
            report = replace(report, stats=_stats(adapter, base, options, progress))
        if options.blocks and adapter is not None:
            report = replace(report, blocks=block_rows(adapter, _norms(report.stats)))
        if options.compare is not None:
            report = replace(report, comparison=_comparison(store, adapter, base, options, progress))
        if options.check != "none":
            report = replace(report, findings=_findings(store, adapter, report, values))
        return report


def _read_once(store: TensorStore, adapter: Adapter | None, *, check: bool) -> list[Finding]:
    """Hash the files of a store; with ``check`` from what is read of them to look at the values.

    Small files are kept in memory, so that what measures them reads nothing again.
    """
    for file in store.opened:
        if isinstance(file, SafetensorsFile):
            if check:
                file.keep()
            file.hash_in_passing(with_data=True)
    if not check:
        return []
    from lycotool.ops._inspect_checks import value_findings

    return value_findings(store, adapter)


def _stats(adapter: Adapter, base: TensorStore | None, options: InspectOptions, progress: Progress) -> Stats:
    from lycotool.devices import resolve_device
    from lycotool.ops._inspect_stats import measure

    return measure(adapter, resolve_device(options.device, float64=True), base, progress)


def _norms(stats: Stats | None) -> dict[str, float] | None:
    return None if stats is None else {m.name: m.fro for m in stats.modules if m.fro is not None}


def _comparison(
    store: TensorStore,
    adapter: Adapter | None,
    base: TensorStore | None,
    options: InspectOptions,
    progress: Progress,
) -> Comparison:
    from lycotool.devices import resolve_device
    from lycotool.ops._inspect_compare import compare

    with open_store(options.compare or "", allow_pickle=options.allow_pickle) as other:
        for one in (store, other):
            if not is_adapter(one):
                raise IncompatibleError(
                    "is no adapter; `--compare` puts two adapters side by side", path=one.path
                )
        second = read_adapter(other, reading=options.reading)
        if adapter is None:
            raise TypeError(store.path)
        return compare(adapter, second, resolve_device(options.device, float64=True), base, progress)


def _findings(
    store: TensorStore, adapter: Adapter | None, report: InspectReport, values: Sequence[Finding]
) -> list[Finding]:
    """Everything that is wrong or odd, worst first."""
    from lycotool.ops._findings import SEVERITIES
    from lycotool.ops._inspect_checks import change_findings, hash_findings, header_findings

    found = header_findings(store, adapter, report.metadata)
    found += hash_findings(report.hashes or ())
    found += values
    if report.stats is not None:
        found += change_findings(report.stats, store.path)
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))


def expand(names: Iterable[str]) -> list[str]:
    """Replace folders that are no model themselves by the models in them.

    Those are safetensors files, and PEFT and diffusers folders as one.

    A name that is no file but has ``*``, ``?`` or ``[…]`` in it is a pattern, for shells that
    leave patterns to the program; ``**`` goes into folders.
    """
    expanded: list[str] = []
    for name in names:
        path = Path(name)
        if name != "-" and exists(path) and path.is_dir() and not _is_model_folder(path):
            expanded += _inside(path)
        elif name != "-" and any(mark in name for mark in "*?[") and not exists(path):
            expanded += expand(sorted(glob.glob(name, recursive=True))) or [name]  # noqa: PTH207 - patterns may be absolute
        else:
            expanded.append(name)
    return expanded


def _inside(folder: Path) -> list[str]:
    """Models below a folder, in the order of their paths."""
    found: dict[Path, None] = {}
    whole: dict[Path, Path | None] = {folder: None}

    def whole_of(parent: Path) -> Path | None:
        """The outermost folder at or above ``parent`` that is one model."""
        if parent not in whole:
            outer = whole_of(parent.parent)
            is_whole = outer is None and any((parent / name).exists() for name in _FOLDER_FILES)
            whole[parent] = parent if is_whole else outer
        return whole[parent]

    for file in sorted(folder.rglob("*.safetensors")):
        found.setdefault(whole_of(file.parent) or file)
    return [str(path) for path in found]


#: What a folder has that is one model.
_FOLDER_FILES = ("adapter_config.json", "model_index.json")


def _is_model_folder(path: Path) -> bool:
    return any((path / name).exists() for name in _FOLDER_FILES) or bool(list(path.glob("*.index.json")))


def _report(store: TensorStore, adapter: Adapter | None) -> InspectReport:
    infos = [file.tensors[name] for file, name in store.entries.values()]
    metadata = {key: _decoded(key, value) for key, value in sorted(store.metadata.items())}
    if adapter is None:
        guess = guess_checkpoint(store.shapes, store.metadata)
        components = count(COMPONENT_NAMES[split_path(key)[0]] for key in store.entries)
    else:
        widths = widths_of(adapter)
        guess = guess_architecture(adapter.keys.modules, widths, store.metadata)
        components = count(map(component_of, adapter.keys.modules))
    return InspectReport(
        path=store.path,
        kind="adapter" if adapter is not None else "checkpoint" if store.entries else "empty",
        bytes=sum(path.stat().st_size for path in store.files),
        tensors=len(infos),
        parameters=sum(map(math.prod, (info.shape for info in infos))),
        dtypes=dict(sorted(count(info.dtype for info in infos).items())),
        architecture=guess.name,
        architecture_evidence=guess.evidence,
        dialects=dialects(adapter.keys) if adapter else [],
        components=components,
        algorithms=algorithm_rows(adapter.modules.values()) if adapter else [],
        loaders=loader_rows(adapter) if adapter else [],
        module_count=len(adapter.modules) if adapter else 0,
        metadata=metadata,
        metadata_summary={key: metadata[key] for key in _SUMMARY_KEYS if key in metadata},
        warnings=[*adapter.warnings, *adapter.notes] if adapter else list(store.warnings),
        faults=[_fault_text(fault) for fault in adapter.faults] if adapter else [],
    )


def _fault_text(fault: LycotoolError) -> str:
    return f"{fault.key}: {fault.message}" if fault.key else fault.message


def _decoded(key: str, value: str) -> object:
    if key not in JSON_KEYS:
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if _is_shallow(found) else value


def _is_shallow(document: object, limit: int = 32) -> bool:
    """Whether JSON is nested no deeper than what is written by trainers, and can be printed."""
    layer = [document]
    for _ in range(limit):
        layer = [
            item
            for one in layer
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not layer:
            return True
    return False
