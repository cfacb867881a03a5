"""inspect: what a file is, from its header alone. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lycotool.errors import LycotoolError
from lycotool.formats.keys import dialect_of, dialects
from lycotool.formats.loaders import LOADERS, ModuleKind, refusal
from lycotool.io.hashes import MODEL_HASH, file_hashes
from lycotool.io.open import open_store
from lycotool.io.store import SafetensorsFile, TensorStore
from lycotool.models.architecture import guess_architecture, guess_checkpoint
from lycotool.models.block_weights import BlockLabels
from lycotool.models.families.locate import guess_families
from lycotool.models.naming import split_name, split_path
from lycotool.ops._adapter import Adapter, AdapterModule, is_adapter, read_adapter

#: How reports call the components of :mod:`lycotool.models.naming`.
_COMPONENT_NAMES: Mapping[str, str] = {
    "unet": "UNet/DiT", "te1": "TE1", "te2": "TE2", "te3": "TE3", "vae": "VAE", "any": "unnamed",
}  # fmt: skip

#: Metadata shown in the summary, in this order.
_SUMMARY_KEYS = (
    "modelspec.title", "modelspec.architecture", "modelspec.author", "modelspec.trigger_phrase",
    "ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_learning_rate", "ss_unet_lr",
    "ss_text_encoder_lr", "ss_lr_scheduler", "ss_optimizer", "ss_steps", "ss_epoch",
    "ss_num_train_images", "ss_resolution", "ss_clip_skip", "ss_training_comment",
    "sshs_model_hash", "lycotool.version",
)  # fmt: skip

#: Metadata whose values are JSON in a string.
_JSON_KEYS = frozenset({
    "ss_network_args", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info",
    "ss_tag_frequency", "lora_adapter_metadata", "lycoris_config", "lycotool.merge", "lycotool.bake",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AlgorithmRow:
    """One kind of module in a file.

    ``rank`` and ``alpha`` count modules by value; ``exact_as_lora`` says whether the kind
    converts to LoRA factors without loss and without the base weight.
    """

    type: str
    algorithm: str
    layouts: dict[str, int]
    modules: int
    components: dict[str, int]
    rank: dict[str, int]
    alpha: dict[str, int]
    use_conv_cp: bool
    dora_axis: str | None
    needs_base: bool
    mergeable: bool
    mergeable_reason: str
    resizable: bool
    resizable_reason: str
    exact_as_lora: bool
    remedy: str
    advice: str


@dataclass(frozen=True, slots=True)
class LoaderRow:
    """One program and the modules of a file that it takes; reasons count the others."""

    loader: str
    version: str
    takes: int
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class HashRow:
    """Hashes of one file; ``stale`` says that the stored one is not that of its data.

    ``autov2`` and ``autov3`` are how Civitai shortens ``sha256`` and ``data_sha256``.
    """

    sha256: str
    autov2: str
    data_sha256: str
    autov3: str
    stored: str | None
    stale: bool


@dataclass(frozen=True, slots=True)
class BlockRow:
    """The modules in one block of the model, in the labels of layer-block weights."""

    block: str
    modules: int
    types: dict[str, int]
    rank: dict[str, int]
    parameters: int


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One module, for ``--modules``; ``loaders`` are the programs that take it."""

    name: str
    type: str
    layout: str
    component: str
    shape: str
    rank: int | None
    alpha: float | None
    scale: float
    parameters: int
    dtype: str
    loaders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InspectReport:
    """Everything `inspect` knows of one file."""

    path: str
    kind: str
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
    modules: list[ModuleRow]
    metadata: dict[str, object]
    metadata_summary: dict[str, object]
    warnings: list[str]
    faults: list[str]
    hashes: list[HashRow] | None = None
    blocks: list[BlockRow] | None = None


def inspect(
    name: str, *, allow_pickle: bool = False, hashes: bool = False, blocks: bool = False
) -> InspectReport:
    """Describe one file, PEFT folder, sharded index or diffusers folder.

    Parameters
    ----------
    hashes
        Read the whole file for its hashes.
    blocks
        Count modules by the block of the model they are in.

    Raises
    ------
    LycotoolError
        If the file cannot be read. Faults of single modules are part of the report.
    """
    with open_store(name, allow_pickle=allow_pickle) as store:
        adapter = read_adapter(store) if is_adapter(store) else None
        report = _report(store, adapter)
        if hashes:
            report = replace(report, hashes=_hashes(store))
        if blocks and adapter is not None:
            report = replace(report, blocks=_blocks(adapter))
        return report


def expand(names: Iterable[str]) -> list[str]:
    """Replace folders that are no model themselves by the safetensors files in them."""
    expanded: list[str] = []
    for name in names:
        path = Path(name)
        if name != "-" and path.is_dir() and not _is_model_folder(path):
            expanded += [str(file) for file in sorted(path.rglob("*.safetensors"))]
        else:
            expanded.append(name)
    return expanded


def _is_model_folder(path: Path) -> bool:
    return any((path / name).exists() for name in ("adapter_config.json", "model_index.json")) or bool(
        list(path.glob("*.index.json"))
    )


def _report(store: TensorStore, adapter: Adapter | None) -> InspectReport:
    infos = [entry.info for entry in store.entries.values()]
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    metadata = {key: _decoded(key, value) for key, value in sorted(store.metadata.items())}
    if adapter is None:
        guess = guess_checkpoint(store.shapes, store.metadata)
        components = _count(split_path(key)[0] for key in store.entries)
    else:
        modules = adapter.modules.values()
        widths = {
            m.name: c for m in modules if (c := m.detected.layout.columns(m.detected.sizes)) is not None
        }
        guess = guess_architecture(adapter.keys.modules, widths, store.metadata)
        components = _count(split_name(name).place[0] for name in adapter.keys.modules)
    return InspectReport(
        path=store.path,
        kind="adapter" if adapter is not None else "checkpoint" if store.entries else "empty",
        bytes=sum(path.stat().st_size for path in store.files),
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        dtypes=dict(sorted(dtypes.items())),
        architecture=guess.name,
        architecture_evidence=guess.evidence,
        dialects=dialects(adapter.keys) if adapter else [],
        components={_COMPONENT_NAMES[name]: count for name, count in components.items()},
        algorithms=_algorithm_rows(adapter.modules.values()) if adapter else [],
        loaders=_loader_rows(adapter) if adapter else [],
        modules=[_module_row(m, adapter) for m in adapter.modules.values()] if adapter else [],
        metadata=metadata,
        metadata_summary={key: metadata[key] for key in _SUMMARY_KEYS if key in metadata},
        warnings=[*adapter.warnings, *adapter.notes] if adapter else list(store.warnings),
        faults=[_fault_text(fault) for fault in adapter.faults] if adapter else [],
    )


def _hashes(store: TensorStore) -> list[HashRow]:
    """One row for each safetensors file."""
    rows = []
    for file in store.opened:
        if not isinstance(file, SafetensorsFile):
            continue
        whole, data = file_hashes(file.path, file.data_start)
        stored = file.metadata.get(MODEL_HASH)
        # LyCORIS hashes the tensors in another order than the file's, and writes a prefix.
        stale = stored is not None and not stored.startswith("0x") and stored != data
        rows.append(HashRow(whole, whole[:10], data, data[:12], stored, stale))
    return rows


def _blocks(adapter: Adapter) -> list[BlockRow]:
    """Modules by block, in the order of the blocks' names; ``-`` is outside of all."""
    modules = list(adapter.modules.values())
    widths = {m.name: c for m in modules if (c := m.detected.layout.columns(m.detected.sizes)) is not None}
    families = guess_families(adapter.modules, widths, adapter.store.metadata)
    if not families:
        return []
    labels = BlockLabels(families[0])
    groups: dict[str, list[AdapterModule]] = {}
    for module in modules:
        groups.setdefault(labels.of(module.name) or "-", []).append(module)
    return [
        BlockRow(
            block,
            len(group),
            _count(module.detected.label for module in group),
            _count("full" if m.dims.rank is None else str(m.dims.rank) for m in group),
            sum(adapter.store.info(key).numel for m in group for key in m.keys.values()),
        )
        for block, group in sorted(groups.items(), key=lambda item: labels.order(item[0]))
    ]


def _fault_text(fault: LycotoolError) -> str:
    return f"{fault.key}: {fault.message}" if fault.key else fault.message


def _decoded(key: str, value: str) -> object:
    if key not in _JSON_KEYS:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _algorithm_rows(modules: Iterable[AdapterModule]) -> list[AlgorithmRow]:
    groups: dict[str, list[AdapterModule]] = {}
    for module in modules:
        groups.setdefault(module.detected.label, []).append(module)
    rows = [_algorithm_row(label, group) for label, group in groups.items()]
    return sorted(rows, key=lambda row: (-row.modules, row.type))


def _algorithm_row(label: str, modules: Sequence[AdapterModule]) -> AlgorithmRow:
    detected = modules[0].detected
    merge, resize = detected.merge_rule, detected.resize_rule
    return AlgorithmRow(
        type=label,
        algorithm=detected.algorithm.name,
        layouts=_count(module.detected.layout.name for module in modules),
        modules=len(modules),
        components=_count(_COMPONENT_NAMES[split_name(module.name).place[0]] for module in modules),
        rank=_count("full" if m.dims.rank is None else str(m.dims.rank) for m in modules),
        alpha=_count("none" if m.dims.alpha is None else f"{m.dims.alpha:g}" for m in modules),
        use_conv_cp=detected.layout.use_conv_cp,
        dora_axis=detected.dora_axis,
        needs_base=detected.needs_base,
        mergeable=merge.allowed,
        mergeable_reason=merge.reason,
        resizable=resize.allowed,
        resizable_reason=resize.reason,
        exact_as_lora=detected.algorithm.factors is not None and detected.dora_slot is None,
        remedy=merge.remedy or resize.remedy,
        advice=detected.algorithm.advice_text,
    )


def _loader_rows(adapter: Adapter) -> list[LoaderRow]:
    rows = []
    for loader in LOADERS:
        reasons = [refusal(loader, _kind(adapter, module)) for module in adapter.modules.values()]
        refused = _count(reason for reason in reasons if reason is not None)
        rows.append(LoaderRow(loader.name, loader.version, reasons.count(None), refused))
    return rows


def _kind(adapter: Adapter, module: AdapterModule) -> ModuleKind:
    detected = module.detected
    return ModuleKind(
        dialect_of(module.name, adapter.keys),
        detected.algorithm.name,
        detected.layout.name,
        detected.layout.use_conv_cp,
        detected.dora_axis,
    )


def _module_row(module: AdapterModule, adapter: Adapter) -> ModuleRow:
    detected, store = module.detected, adapter.store
    kind = _kind(adapter, module)
    rows, columns = detected.layout.rows(detected.sizes), detected.layout.columns(detected.sizes)
    infos = [store.info(key) for key in module.keys.values()]
    return ModuleRow(
        name=module.name,
        type=detected.label,
        layout=detected.layout.name,
        component=_COMPONENT_NAMES[split_name(module.name).place[0]],
        shape=f"{'?' if rows is None else rows}x{'?' if columns is None else columns}",
        rank=module.dims.rank,
        alpha=module.dims.alpha,
        scale=module.dims.scale,
        parameters=sum(info.numel for info in infos),
        dtype="+".join(sorted({i.dtype for i in infos if i.numel > 1} or {i.dtype for i in infos})),
        loaders=tuple(loader.name for loader in LOADERS if refusal(loader, kind) is None),
    )
