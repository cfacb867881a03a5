"""What is wrong, or odd, with a file, as data; for `inspect --check`.

Each function looks at one kind of evidence: names and shapes, metadata, stored hashes, values,
and the measured changes. The first two read the header alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lycotool.errors import NumericError
from lycotool.formats.keys import dialects
from lycotool.formats.loaders import LOADERS, refusal
from lycotool.io.dtypes import FLOATING
from lycotool.io.hashes import MODEL_HASH, SPEC_HASH
from lycotool.io.store import SafetensorsFile, TensorStore
from lycotool.lazy import torch
from lycotool.linalg.finite import extremes
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._findings import Finding, finding
from lycotool.ops._inspect_rows import HashRow, kind_of
from lycotool.ops._metadata_keys import JSON_KEYS, TRAINING_DATA
from lycotool.ops._naming import shared_layers
from lycotool.ops._render import outline

if TYPE_CHECKING:
    from lycotool.ops._inspect_stats import Stats

#: The largest finite float16.
_FP16_MAX = 65504.0

#: SHA-256 of no bytes at all; some trainers hash before they write.
_HASH_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

#: Absolute paths of a computer: a drive, or a folder under which people's files are.
_LOCAL_PATH = re.compile(
    r"(?<![\w/])(?:[A-Za-z]:[\\/]{1,2}[^\s\"',;]|\\\\[\w.-]+\\|"
    r"/(?:home|Users|root|mnt|media|workspace|content|kaggle|data|tmp|opt|srv|var|notebooks|Volumes)/[^\s\"',;])"
)

#: Algorithms whose rank is that of one product, so that one above the matrix' is waste.
_PLAIN_RANK = frozenset({"lora", "dylora", "tlora"})

#: Share of the rank that energy does not need at which `resize` is worth a hint.
_WASTE = 0.5


def header_findings(
    store: TensorStore, adapter: Adapter | None, metadata: Mapping[str, object]
) -> list[Finding]:
    """What names, shapes, alphas and metadata tell."""
    found = list(_about_metadata(store, metadata))
    if any(not isinstance(file, SafetensorsFile) for file in store.opened):
        found.append(finding("pickle", "is a PyTorch pickle, which can run code in programs that load it",
                             remedy="`lycotool convert` or `merge` writes safetensors"))  # fmt: skip
    if adapter is not None:
        found = [*_about_names(adapter), *_about_alphas(adapter), *_about_forms(adapter),
                 *_about_numbers(adapter, metadata), *found]  # fmt: skip
    return found


def _about_names(adapter: Adapter) -> Iterator[Finding]:
    faults: dict[tuple[str, str], list[str]] = {}
    for fault in adapter.faults:
        id = "alpha-not-finite" if isinstance(fault, NumericError) else "damaged-module"
        faults.setdefault((id, fault.message), []).append(fault.key or "")
    for (id, message), modules in faults.items():
        yield finding(
            id, message, modules, "train or export the file again; no program can read these modules"
        )
    keys = adapter.keys
    if keys.orphans:
        yield finding("orphan-alpha", f"{len(keys.orphans)} alphas without a module", keys.orphans,
                      "the modules' other tensors are missing")  # fmt: skip
    if keys.unknown:
        yield finding("unknown-tensor", f"{len(keys.unknown)} tensors that belong to no known algorithm", keys.unknown,
                      "every command leaves them aside")  # fmt: skip
    for names in shared_layers(keys.modules):
        yield finding("duplicate-layer", f"{len(names)} modules change the same layer", names,
                      "programs add both or take one of them; keep one")  # fmt: skip
    named = dialects(keys)
    if len(keys.spellings) > 1 or len(named) > 1:
        spelled = [*named, *(s for s in sorted(keys.spellings) if len(keys.spellings) > 1)]
        yield finding("mixed-spellings", "mixes the key names of " + " and ".join(dict.fromkeys(spelled)),
                      remedy="`lycotool convert --to FORMAT` names all modules alike")  # fmt: skip


def _about_alphas(adapter: Adapter) -> Iterator[Finding]:
    ranked = [m for m in adapter.modules.values() if m.dims.rank is not None]
    stored = [(m, m.dims.alpha) for m in ranked if m.dims.alpha is not None]
    missing = [m.name for m in ranked if m.dims.alpha is None]
    if missing and adapter.keys.spelling == "kohya":
        yield finding("alpha-missing", f"{len(missing)} modules have no alpha; it is read as the rank", missing,
                      "`lycotool convert` and `resize` write it out")  # fmt: skip
    if zero := [m.name for m, alpha in stored if alpha == 0]:
        yield finding("alpha-zero", f"alpha is 0 in {len(zero)} modules: programs see no change", zero,
                      "`--alpha-zero rank` reads it as the rank, which trainers mean by it")  # fmt: skip
    if negative := [m.name for m, alpha in stored if alpha < 0]:
        yield finding("alpha-negative", f"alpha is negative in {len(negative)} modules: their change is inverted", negative)  # fmt: skip
    if above := [m.name for m, alpha in stored if m.dims.rank is not None and alpha > m.dims.rank]:
        yield finding("alpha-above-rank", f"alpha is above the rank in {len(above)} modules (rs_lora, or folded strengths)", above)  # fmt: skip


def _about_forms(adapter: Adapter) -> Iterator[Finding]:
    above = [m.name for m in adapter.modules.values() if _is_above(m)]
    if above:
        yield finding("rank-above-size", f"the rank of {len(above)} modules is above the smaller side of their matrix", above,
                      "`lycotool resize` stores the same change in less")  # fmt: skip
    axes: dict[str, list[str]] = {}
    for module in adapter.modules.values():
        if module.detected.dora_axis is not None:
            axes.setdefault(module.detected.dora_axis, []).append(module.name)
    for axis, names in axes.items():
        able = [loader.name for loader in LOADERS if axis in loader.dora_axes]
        yield finding("dora-axis", f"DoRA over the {axis}put axis: {', '.join(able)} compute it as it was trained, other programs do not",
                      names, "`lycotool bake` folds it into a checkpoint")  # fmt: skip
    lost = [
        m.name
        for m in adapter.modules.values()
        if all(refusal(loader, kind_of(adapter, m)) is not None for loader in LOADERS)
    ]
    if lost:
        yield finding("no-loader", f"no program in the table of loaders takes {len(lost)} modules", lost,
                      "`lycotool convert --to FORMAT`, or `bake`")  # fmt: skip


def _is_above(module: AdapterModule) -> bool:
    rows, columns = outline(module)
    if module.detected.algorithm.name not in _PLAIN_RANK or rows is None or columns is None:
        return False
    return (module.dims.rank or 0) > min(rows, columns)


def _about_numbers(adapter: Adapter, metadata: Mapping[str, object]) -> Iterator[Finding]:
    """Metadata against tensors."""
    ranked = [m for m in adapter.modules.values() if m.dims.rank is not None]
    for key, values in (
        ("ss_network_dim", {float(m.dims.rank) for m in ranked if m.dims.rank is not None}),
        ("ss_network_alpha", {m.dims.alpha for m in ranked if m.dims.alpha is not None}),
    ):
        said = _number(metadata.get(key))
        arguments = metadata.get("ss_network_args")
        folded = (
            key == "ss_network_alpha" and isinstance(arguments, dict) and _is_true(arguments.get("rs_lora"))
        )
        if said is None or not values or folded:
            continue
        if not any(math.isclose(said, value, rel_tol=1e-2) for value in values):  # alphas may be bf16
            held = ", ".join(f"{value:g}" for value in sorted(values)[:5])
            yield finding("metadata-conflict", f"{key} says {said:g}, the tensors have {held}", [key],
                          f"the tensors count; `--set {key}=…` corrects it")  # fmt: skip
    arguments = metadata.get("ss_network_args")
    alpha = _number(metadata.get("ss_network_alpha"))
    if isinstance(arguments, dict) and _is_true(arguments.get("rs_lora")) and alpha:
        plain = [m.name for m in ranked if (m.dims.rank or 1) > 1 and m.dims.alpha == alpha]
        if plain:
            yield finding("rs-lora-not-folded", f"was trained with rs_lora, but {len(plain)} modules store alpha {alpha:g} as it was given",
                          plain, "LyCORIS stores alpha·√rank then; if a tool wrote alpha back, the change is √rank too weak")  # fmt: skip


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None


def _is_true(value: object) -> bool:
    return str(value).lower() == "true"


def _about_metadata(store: TensorStore, metadata: Mapping[str, object]) -> Iterator[Finding]:
    broken = [key for key in JSON_KEYS & metadata.keys() if not _is_json(store.metadata.get(key, ""))]
    if broken:
        yield finding("metadata-not-json", "these values should be JSON and are not", sorted(broken),
                      "`--unset KEY` takes them out")  # fmt: skip
    leaking = {
        key: match[0] for key, text in sorted(store.metadata.items()) if (match := _LOCAL_PATH.search(text))
    }
    if leaking:
        yield finding("private-path", "names folders of the computer it was made on", leaking,
                      "`lycotool inspect FILE --strip-training-data`, or `--unset KEY`, takes them out")  # fmt: skip
    data = sorted(TRAINING_DATA & metadata.keys())
    if data:
        yield finding("training-data", "tells what it was trained on: folders, captions, counts", data,
                      "`--strip-training-data` takes them out")  # fmt: skip
    if (stored := store.metadata.get(MODEL_HASH, "")).removeprefix("0x").startswith(_HASH_OF_NOTHING[:8]):
        yield finding("hash-of-nothing", f"{MODEL_HASH} is {stored[:12]}, the hash of an empty file", [MODEL_HASH],
                      "`--unset sshs_model_hash`; every writing command of lycotool computes it")  # fmt: skip


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def hash_findings(rows: Sequence[HashRow]) -> list[Finding]:
    """Stored hashes that are not those of the data."""
    nothing = _HASH_OF_NOTHING[:8]
    stale = [(row, MODEL_HASH, row.stored) for row in rows if row.stale and row.stored]
    stale += [
        (row, SPEC_HASH, row.stored_spec)
        for row in rows
        if row.stored_spec and row.stored_spec.lower().removeprefix("0x") != row.data_sha256
    ]
    return [
        finding(
            "stale-hash",
            f"{key} is {stored[:14]}…, the data's hash is {row.data_sha256[:12]}…",
            [key],
            "the tensors were changed after it was stored; Civitai and A1111 look files up by such hashes",
        )
        for row, key, stored in stale
        if not stored.startswith(nothing)
    ]


def value_findings(store: TensorStore, adapter: Adapter | None) -> list[Finding]:
    """What every stored value tells, one tensor at a time."""
    scales: dict[str, float] = {}
    for module in adapter.modules.values() if adapter else ():
        for key in module.keys.values():
            scales[key] = max(1.0, abs(module.dims.scale))
    broken: dict[str, str] = {}
    large: list[str] = []
    wide = fitting = 0
    for key, entry in store.entries.items():
        if entry.info.dtype not in FLOATING or not entry.info.numel:
            continue
        tensor = store.tensor(key)
        values = tensor.float() if entry.info.dtype.startswith("F8") else tensor
        low, high = extremes(values)
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(values)).sum())
            broken[key] = f"{key} ({count} of {values.numel()})"
            continue
        if max(-low, high) * scales.get(key, 1.0) > _FP16_MAX:
            large.append(key)
        if entry.info.dtype in ("F32", "F64"):
            # One tensor that does not fit answers for all of them.
            fits = fitting == wide and torch.equal(tensor.half().to(tensor.dtype), tensor)
            wide += entry.info.nbytes
            fitting += entry.info.nbytes if fits else 0
    found = []
    if broken:
        found.append(finding("non-finite", "NaN or infinite values in " + ", ".join(list(broken.values())[:5]), broken,
                             "programs turn them into black or noisy images; take an earlier checkpoint"))  # fmt: skip
    if large:
        found.append(finding("fp16-overflow", f"{len(large)} tensors have values (alpha/rank included) above {_FP16_MAX:g}, which float16 cannot hold",
                             large, "keep them in bf16 or fp32 (`--dtype bf16`)"))  # fmt: skip
    if wide and fitting == wide:
        found.append(finding("fits-fp16", "every float32 value is a float16 too: the file could be half as large",
                             remedy="`lycotool convert --dtype fp16` or `resize --dtype fp16` loses nothing"))  # fmt: skip
    return found


def change_findings(stats: Stats, path: str) -> list[Finding]:
    """What the measured changes tell."""
    found = []
    dead = [m.name for m in stats.modules if m.is_dead]
    if dead and len(dead) == len(stats.modules):
        found.append(finding("dead-module", "no module changes anything: the file was never trained", dead))
    elif dead:
        found.append(finding("dead-module", f"{len(dead)} of {len(stats.modules)} modules change nothing", dead,
                             "they were not trained, or were zeroed; without them the file does the same"))  # fmt: skip
    ranked = [m for m in stats.modules if m.energy_rank_99 and m.rank and m.rank > 1]
    total, needed = sum(m.rank or 0 for m in ranked), sum(m.energy_rank_99 or 0 for m in ranked)
    if total and 1 - needed / total > _WASTE:
        found.append(finding("wasted-rank", f"{100 * (1 - needed / total):.0f} % of the ranks hold 1 % of the energy",
                             remedy=f"`lycotool resize {path} --method sv_fro --param 0.995`"))  # fmt: skip
    baseless = [m.name for m in stats.modules if m.reason and m.is_finite]
    if baseless:
        found.append(finding("needs-base", f"{len(baseless)} modules were not measured: " + "; ".join(stats.unmeasured),
                             baseless, "`--base CHECKPOINT` gives the weights they depend on"))  # fmt: skip
    return found
