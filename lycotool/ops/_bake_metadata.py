"""The metadata of a checkpoint with adapters folded in: what is still true, and what it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lycotool.io.hashes import LEGACY_HASH, MODEL_HASH, SPEC_HASH
from lycotool.io.store import TensorStore, reading
from lycotool.models.families import FAMILIES
from lycotool.models.families.locate import guess_families
from lycotool.models.naming import ANY, split_name
from lycotool.ops._adapter import Adapter
from lycotool.ops._common import provenance
from lycotool.ops._origin import safetensors_files
from lycotool.ops._strengths import Weighted

_SPEC = "modelspec."

#: Entries that speak of the file before, and cannot be said of the new one.
_STALE = frozenset({MODEL_HASH, LEGACY_HASH, SPEC_HASH, "lora_adapter_metadata", "modelspec.date"})

#: Entries that are no longer true once tensors are saved in another dtype.
_OF_DTYPES = frozenset({"modelspec.unet_dtype", "modelspec.vae_dtype"})

#: Families whose keys tell the published model; others share theirs with relatives (SD 2 at 512
#: and 768, Flux dev and Kontext, Wan 2.1 and 2.2).
_TOLD_BY_KEYS = frozenset({"sd1", "sdxl", "chroma", "lumina2"})


def file_sha256(adapter: Adapter) -> str:
    """SHA-256 of an adapter's weights, over all its files in order."""
    opened = safetensors_files(adapter.store)
    for one in opened:
        one.keep()
    if len(opened) == 1 and [opened[0].path] == adapter.store.files:
        return opened[0].sha256()
    hasher = hashlib.sha256()
    for path in adapter.store.files:
        with reading(path), path.open("rb") as file:
            while piece := file.read(2**23):
                hasher.update(piece)
    return hasher.hexdigest()


def origin(
    command: str, store: TensorStore, adapters: Sequence[Weighted], hashes: Sequence[str], **more: object
) -> dict[str, str]:
    """The entries that say what a checkpoint was made from.

    Parameters
    ----------
    hashes
        SHA-256 of each adapter's file.
    more
        What else the command did.
    """
    recipe = [
        {**weighted.recipe, "sha256": sha256} for weighted, sha256 in zip(adapters, hashes, strict=True)
    ]
    made = {"base": Path(store.path).name, "adapters": recipe, **more}
    return provenance(command, json.dumps(made))


def checkpoint_metadata(
    store: TensorStore,
    title: str,
    merged: Sequence[tuple[str, str]],
    *,
    keeps_dtypes: bool,
) -> dict[str, str]:
    """The checkpoint's own metadata as far as it is still true, and ``modelspec.*`` of the result.

    ``modelspec.hash_sha256`` is left to the writer. Source: Stability's model metadata
    standard, https://github.com/Stability-AI/ModelSpec.

    Parameters
    ----------
    title
        The new file's name without suffixes.
    merged
        Name and SHA-256 of each adapter.
    """
    gone = _STALE if keeps_dtypes else _STALE | _OF_DTYPES
    kept = {name: text for name, text in store.metadata.items() if name not in gone}
    architecture = kept.get("modelspec.architecture") or _architecture(store)
    if architecture is None:
        return kept
    before = kept.get("modelspec.merged_from") or kept.get("modelspec.title") or Path(store.path).name
    spec = {
        "modelspec.sai_model_spec": kept.get("modelspec.sai_model_spec", "1.0.1"),
        "modelspec.architecture": architecture,
        "modelspec.title": title,
    }
    if merged:
        names = [f"{name} ({sha256[:10]})" for name, sha256 in merged]
        spec["modelspec.merged_from"] = ", ".join([_stem(before), *names])
    return kept | spec


def has_spec(metadata: Mapping[str, str]) -> bool:
    """Whether metadata follow the standard, so that the hash belongs there."""
    return any(name.startswith(_SPEC) for name in metadata)


def _stem(name: str) -> str:
    for suffix in (".safetensors.index.json", ".safetensors"):
        name = name.removesuffix(suffix)
    return name


def _architecture(store: TensorStore) -> str | None:
    """The standard's name of the model, from its keys; None where they do not tell."""
    widths: dict[str, int] = {}
    names = []
    for key, entry in store.entries.items():
        if not key.endswith(".weight") or split_name(key).component not in ("unet", ANY):
            continue
        names.append(key.removesuffix(".weight"))
        if len(entry.info.shape) > 1:
            widths[names[-1]] = entry.info.shape[1]
    found = guess_families(names, widths, {}) if names else []
    if len(found) != 1 or found[0] not in _TOLD_BY_KEYS:
        return None
    return FAMILIES[found[0]].model_spec.removesuffix("/lora")
