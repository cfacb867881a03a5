"""From the keys of an adapter file to modules with canonical slot names, and back.

A key is a module's name and a suffix. Suffixes are matched longest first from the end of
the key, because dotted dialects have dots in the module's name too. The canonical suffixes
are those of the registry (kohya's and LyCORIS' own); other programs' are in :data:`ALIASES`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

Spelling = Literal["kohya", "peft", "diffusers legacy", "hcp", "xlabs"]

#: Suffixes of other programs -> (canonical slot, who spells it so).
ALIASES: Mapping[str, tuple[str, Spelling]] = {
    "lora_A.weight": ("lora_down.weight", "peft"),
    "lora_B.weight": ("lora_up.weight", "peft"),
    "lora_A.default.weight": ("lora_down.weight", "peft"),
    "lora_B.default.weight": ("lora_up.weight", "peft"),
    "lora_A": ("lora_down.weight", "peft"),
    "lora_B": ("lora_up.weight", "peft"),
    "lora_B.bias": ("lora_up.bias", "peft"),
    "lora_magnitude_vector.weight": ("lora_magnitude_vector", "peft"),
    "lora_magnitude_vector.default.weight": ("lora_magnitude_vector", "peft"),
    "magnitude": ("dora_scale", "peft"),
    "lora.down.weight": ("lora_down.weight", "diffusers legacy"),
    "lora.up.weight": ("lora_up.weight", "diffusers legacy"),
    "lora_linear_layer.down.weight": ("lora_down.weight", "diffusers legacy"),
    "lora_linear_layer.up.weight": ("lora_up.weight", "diffusers legacy"),
    "___.layer.W_down": ("lora_down.weight", "hcp"),
    "___.layer.W_up": ("lora_up.weight", "hcp"),
    "___.layer.lora_down.weight": ("lora_down.weight", "hcp"),
    "___.layer.lora_up.weight": ("lora_up.weight", "hcp"),
    "___.alpha": ("alpha", "hcp"),
}

#: How each spelling writes the slots of LoRA; the rest is canonical everywhere.
SPELLED: Mapping[Spelling, Mapping[str, str]] = {
    "kohya": {},
    "peft": {
        "lora_down.weight": "lora_A.weight",
        "lora_up.weight": "lora_B.weight",
        "lora_up.bias": "lora_B.bias",
    },
    "diffusers legacy": {
        "lora_down.weight": "lora.down.weight",
        "lora_up.weight": "lora.up.weight",
    },
    "hcp": {"lora_down.weight": "___.layer.W_down", "lora_up.weight": "___.layer.W_up", "alpha": "___.alpha"},
    "xlabs": {},
}

#: diffusers before 0.22: ``attn1.processor.to_q_lora.down.weight``; text encoders alike.
_ATTENTION_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")

#: XLabs' Flux processors; in double blocks 1 is the image's attention and 2 the text's. The
#: single blocks' ``qkv`` are the first rows of ``linear1``, and their ``proj`` is ``linear2``.
_XLABS = re.compile(r"((?:double|single)_blocks\.\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
_XLABS_MODULES: Mapping[tuple[str, str], str] = {
    ("qkv", "1"): "img_attn.qkv", ("proj", "1"): "img_attn.proj",
    ("qkv", "2"): "txt_attn.qkv", ("proj", "2"): "txt_attn.proj",
    ("qkv", ""): "linear1_qkv", ("proj", ""): "linear2",
}  # fmt: skip

#: A textual inversion packed into the adapter; not a module.
_EMBEDDING_PREFIX = "bundle_emb."

#: Slots that say nothing alone: (IA)³'s `weight` is also every checkpoint's.
_NEEDS = {"weight": "on_input"}

_MAX_SUFFIX_PARTS = 4


@dataclass(frozen=True, slots=True)
class ModuleKeys:
    """One module of an adapter file: canonical slot to the key that holds it."""

    name: str
    slots: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AdapterKeys:
    """All keys of a file, sorted out.

    Attributes
    ----------
    modules
        By module name, in the file's order.
    orphans
        Keys with an ``alpha`` and nothing else.
    unknown
        Keys that belong to no module.
    embeddings
        Keys of textual inversions carried along.
    clashes
        Pairs of keys that claim the same slot of the same module.
    spelling
        Whose LoRA suffixes the file uses; the commonest one if it mixes them.
    """

    modules: Mapping[str, ModuleKeys]
    orphans: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    clashes: tuple[tuple[str, str], ...] = ()
    spelling: Spelling = "kohya"
    spellings: Mapping[Spelling, int] = field(default_factory=dict)


def parse_keys(keys: Collection[str], slot_names: Collection[str]) -> AdapterKeys:
    """Group the keys of a file by module.

    Parameters
    ----------
    slot_names
        The canonical suffixes, from the registry.
    """
    return _parse_keys(tuple(keys), frozenset(slot_names))


@lru_cache(maxsize=16)
def _parse_keys(keys: tuple[str, ...], slot_names: frozenset[str]) -> AdapterKeys:
    """:func:`parse_keys`, once for files with the same keys."""
    found: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    embeddings: list[str] = []
    clashes: list[tuple[str, str]] = []
    spellings: dict[Spelling, int] = {}
    present = set(keys)
    for key in keys:
        if key.startswith(_EMBEDDING_PREFIX):
            embeddings.append(key)
            continue
        match = _split(key, slot_names, present)
        if match is None:
            unknown.append(key)
            continue
        module, slot, spelled = match
        if spelled is not None:
            spellings[spelled] = spellings.get(spelled, 0) + 1
        other = found.setdefault(module, {}).setdefault(slot, key)
        if other != key:
            clashes.append((other, key))
    modules = {name: ModuleKeys(name, slots) for name, slots in found.items() if set(slots) != {"alpha"}}
    orphans = tuple(slots["alpha"] for slots in found.values() if set(slots) == {"alpha"})
    spelling: Spelling = max(spellings, key=lambda s: spellings[s]) if spellings else "kohya"
    return AdapterKeys(
        modules, orphans, tuple(unknown), tuple(embeddings), tuple(clashes), spelling, spellings
    )


def _split(
    key: str, slot_names: frozenset[str], present: Collection[str]
) -> tuple[str, str, Spelling | None] | None:
    """Module, canonical slot and (for LoRA factors) spelling of a key."""
    for split in _splits(key, slot_names):
        module, slot, _ = split
        if slot not in _NEEDS or f"{module}.{_NEEDS[slot]}" in present:
            return split
    return None


@lru_cache(maxsize=2**16)
def _splits(key: str, slot_names: frozenset[str]) -> tuple[tuple[str, str, Spelling | None], ...]:
    """Every reading of a key, best first; the files of a folder share most of their keys."""
    if (match := _ATTENTION_PROCESSOR.fullmatch(key)) is not None:
        owner, projection, side = match.groups()
        return ((f"{owner}.{_projection(owner, projection)}", f"lora_{side}.weight", "diffusers legacy"),)
    if (match := _XLABS.fullmatch(key)) is not None:
        block, projection, stream, side = match.groups()
        return ((f"{block}.{_XLABS_MODULES[projection, stream]}", f"lora_{side}.weight", "xlabs"),)
    found: list[tuple[str, str, Spelling | None]] = []
    parts = key.split(".")
    for count in range(min(_MAX_SUFFIX_PARTS, len(parts) - 1), 0, -1):
        module, suffix = ".".join(parts[:-count]), ".".join(parts[-count:])
        if suffix in ALIASES:
            slot, spelling = ALIASES[suffix]
            found.append((module, slot, spelling))
        elif suffix in slot_names:
            found.append((module, suffix, "kohya" if suffix == "lora_up.weight" else None))
    return tuple(found)


def _projection(owner: str, letter: str) -> str:
    """Real layer behind an attention processor's ``to_q_lora`` and so on."""
    if owner.startswith("text_encoder"):
        return f"{letter}_proj"
    return "to_out.0" if letter == "out" else f"to_{letter}"


#: Beginning of the module names -> what the field calls such a file. First match wins.
_DIALECT_PREFIXES: tuple[tuple[str, str], ...] = (
    ("oft_unet_", "kohya OFT"),
    ("lora_transformer_", "OneTrainer"),
    ("lora_", "kohya"),
    ("lycoris_", "LyCORIS wrapper"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("text_encoders.", "ComfyUI"),
    ("model.diffusion_model.", "ComfyUI"),
    ("unet.", "diffusers"),
    ("transformer.", "diffusers"),
    ("text_encoder.", "diffusers"),
    ("text_encoder_2.", "diffusers"),
    ("text_encoder_3.", "diffusers"),
    ("text_conditioner.", "diffusers"),
)


#: What a LoRA's suffixes say beyond the beginning of the names.
_DIALECT_SPELLINGS: Mapping[tuple[str, Spelling], str] = {
    ("diffusers", "diffusers legacy"): "diffusers legacy",
    ("bare paths", "xlabs"): "XLabs",
    ("bare paths", "hcp"): "HCP-Diffusion",
}

#: OneTrainer names text encoders as kohya does, whatever it calls the denoiser's modules.
_SHARED_TEXT_PREFIX = "lora_te"


def dialect_of(name: str, keys: AdapterKeys) -> str:
    """The dialect a module's name is in."""
    return _dialect_of(name, keys.spelling)


@lru_cache(maxsize=2**15)
def _dialect_of(name: str, spelling: Spelling) -> str:
    found = next((d for prefix, d in _DIALECT_PREFIXES if name.startswith(prefix)), "bare paths")
    return _DIALECT_SPELLINGS.get((found, spelling), found)


def dialects(keys: AdapterKeys) -> list[str]:
    """The dialects a file's module names are in, commonest first."""
    named = {name: dialect_of(name, keys) for name in keys.modules}
    counts = Counter(named.values())
    kohya = [name for name, dialect in named.items() if dialect == "kohya"]
    if "OneTrainer" in counts and all(name.startswith(_SHARED_TEXT_PREFIX) for name in kohya):
        counts["OneTrainer"] += counts.pop("kohya", 0)
    return sorted(counts, key=lambda d: (-counts[d], d))
