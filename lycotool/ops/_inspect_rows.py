"""The rows of `inspect`'s tables, from names and shapes alone. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.formats.keys import dialect_of
from lycotool.formats.loaders import LOADERS, ModuleKind, refusal
from lycotool.io.store import SafetensorsFile, TensorStore
from lycotool.models.naming import split_name
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._render import outline

if TYPE_CHECKING:
    from lycotool.models.block_weights import BlockLabels

#: How reports call the components of :mod:`lycotool.models.naming`.
COMPONENT_NAMES: Mapping[str, str] = {
    "unet": "UNet/DiT", "te1": "TE1", "te2": "TE2", "te3": "TE3", "vae": "VAE", "any": "unnamed",
}  # fmt: skip


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

    ``stored_spec`` is ``modelspec.hash_sha256``.
    ``autov2`` and ``autov3`` are how Civitai shortens ``sha256`` and ``data_sha256``.
    """

    sha256: str
    autov2: str
    data_sha256: str
    autov3: str
    stored: str | None
    stale: bool
    stored_spec: str | None


@dataclass(frozen=True, slots=True)
class BlockRow:
    """The modules in one block of the model, in the labels of layer-block weights.

    ``fro`` is the root of the sum of their ``‖ΔW‖_F²``, and ``share`` the part of that sum in the
    whole file's; None where the tensors were not read.
    """

    block: str
    modules: int
    types: dict[str, int]
    rank: dict[str, int]
    parameters: int
    fro: float | None = None
    share: float | None = None


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


def hash_rows(store: TensorStore) -> list[HashRow]:
    """One row for each safetensors file."""
    from lycotool.io.hashes import MODEL_HASH, SPEC_HASH

    rows = []
    for file in store.opened:
        if not isinstance(file, SafetensorsFile):
            continue
        whole, data = file.sha256(), file.data_sha256()
        stored = file.metadata.get(MODEL_HASH)
        # LyCORIS hashes the tensors in another order than the file's, and writes a prefix.
        stale = stored is not None and not stored.startswith("0x") and stored != data
        rows.append(HashRow(whole, whole[:10], data, data[:12], stored, stale, file.metadata.get(SPEC_HASH)))
    return rows


def blocks_of(adapter: Adapter) -> dict[str, str]:
    """The block of each module, ``-`` outside of all; empty where the model is not known."""
    labels = labels_of(adapter)
    return {} if labels is None else {name: labels.of(name) or "-" for name in adapter.modules}


def labels_of(adapter: Adapter) -> BlockLabels | None:
    """The blocks of the model the adapter is for; None where that is not known."""
    from lycotool.models.block_weights import BlockLabels
    from lycotool.models.families.locate import guess_families

    families = guess_families(adapter.modules, widths_of(adapter), adapter.store.metadata)
    return BlockLabels(families[0]) if families else None


def widths_of(adapter: Adapter) -> dict[str, int]:
    """Input widths of the modules whose tensors tell them."""
    by_form: dict[int, int | None] = {}
    widths: dict[str, int] = {}
    for name, module in adapter.modules.items():
        form = id(module.detected)
        if form not in by_form:
            by_form[form] = outline(module)[1]
        if (width := by_form[form]) is not None:
            widths[name] = width
    return widths


def block_rows(adapter: Adapter, norms: Mapping[str, float] | None = None) -> list[BlockRow]:
    """Modules by block, in the order of the blocks' names; ``-`` is outside of all.

    Parameters
    ----------
    norms
        ``‖ΔW‖_F`` by module, where it was computed.
    """
    labels = labels_of(adapter)
    if labels is None:
        return []
    groups: dict[str, list[AdapterModule]] = {}
    for module in adapter.modules.values():
        groups.setdefault(labels.of(module.name) or "-", []).append(module)
    squares = {name: norm**2 for name, norm in (norms or {}).items()}
    total = sum(squares.values())
    rows = []
    for block, group in sorted(groups.items(), key=lambda item: labels.order(item[0])):
        energy = sum(squares.get(module.name, 0.0) for module in group)
        rows.append(
            BlockRow(
                block,
                len(group),
                count(module.detected.label for module in group),
                count("full" if m.dims.rank is None else str(m.dims.rank) for m in group),
                sum(adapter.store.info(key).numel for m in group for key in m.keys.values()),
                None if norms is None else math.sqrt(energy),
                None if norms is None else energy / total if total else 0.0,
            )
        )
    return rows


def component_of(name: str) -> str:
    """What reports call the component that a module is in."""
    return COMPONENT_NAMES[split_name(name).component]


def count(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, in the order of their first occurrence."""
    return dict(Counter(values))


def _added(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Numbers by name, added up where two values have one name."""
    total: dict[str, int] = {}
    for name, number in counts:
        total[name] = total.get(name, 0) + number
    return total


def algorithm_rows(modules: Iterable[AdapterModule]) -> list[AlgorithmRow]:
    """One row for each kind of module, commonest first."""
    groups: dict[str, list[AdapterModule]] = {}
    for module in modules:
        groups.setdefault(module.detected.label, []).append(module)
    rows = [_algorithm_row(label, group) for label, group in groups.items()]
    return sorted(rows, key=lambda row: (-row.modules, row.type))


def _algorithm_row(label: str, modules: Sequence[AdapterModule]) -> AlgorithmRow:
    detected = modules[0].detected
    merge, resize = detected.merge_rule, detected.resize_rule
    ranks = Counter(module.dims.rank for module in modules)
    alphas = Counter(module.dims.alpha for module in modules)
    return AlgorithmRow(
        type=label,
        algorithm=detected.algorithm.name,
        layouts=count(module.detected.layout.name for module in modules),
        modules=len(modules),
        components=count(component_of(module.name) for module in modules),
        rank={"full" if rank is None else str(rank): number for rank, number in ranks.items()},
        alpha=_added(
            (("none" if alpha is None else f"{alpha:g}"), number) for alpha, number in alphas.items()
        ),
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


def loader_rows(adapter: Adapter) -> list[LoaderRow]:
    """One row for each program."""
    forms: dict[tuple[str, int], AdapterModule] = {}
    alike: Counter[tuple[str, int]] = Counter()
    for module in adapter.modules.values():
        form = dialect_of(module.name, adapter.keys), id(module.detected)
        forms[form] = module
        alike[form] += 1
    kinds: Counter[ModuleKind] = Counter()
    for form, number in alike.items():
        kinds[kind_of(adapter, forms[form])] += number
    rows = []
    for loader in LOADERS:
        reasons: Counter[str | None] = Counter()
        for kind, number in kinds.items():
            reasons[refusal(loader, kind)] += number
        takes = reasons.pop(None, 0)
        rows.append(
            LoaderRow(loader.name, loader.version, takes, {r: n for r, n in reasons.items() if r is not None})
        )
    return rows


def kind_of(adapter: Adapter, module: AdapterModule) -> ModuleKind:
    """What decides which programs take a module."""
    detected = module.detected
    return ModuleKind(
        dialect_of(module.name, adapter.keys),
        detected.algorithm.name,
        detected.layout.name,
        detected.layout.use_conv_cp,
        detected.dora_axis,
    )


def module_row(module: AdapterModule, adapter: Adapter) -> ModuleRow:
    """What `--modules` says of a module."""
    detected, store = module.detected, adapter.store
    kind = kind_of(adapter, module)
    rows, columns = detected.layout.rows(detected.sizes), detected.layout.columns(detected.sizes)
    infos = [store.info(key) for key in module.keys.values()]
    return ModuleRow(
        name=module.name,
        type=detected.label,
        layout=detected.layout.name,
        component=component_of(module.name),
        shape=f"{'?' if rows is None else rows}x{'?' if columns is None else columns}",
        rank=module.dims.rank,
        alpha=module.dims.alpha,
        scale=module.dims.scale,
        parameters=sum(info.numel for info in infos),
        dtype="+".join(sorted({i.dtype for i in infos if i.numel > 1} or {i.dtype for i in infos})),
        loaders=tuple(loader.name for loader in LOADERS if refusal(loader, kind) is None),
    )
