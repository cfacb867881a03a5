"""Which layers are trained: LyCORIS' presets as data, and a user's in its TOML format.

A preset names classes, all of whose layers inside are trained, and layers by patterns of
their paths. Here the classes are those of diffusers and transformers; sd-scripts' names for
the same classes are known.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lycotool.errors import BadInputError, UsageError
from lycotool.io.toml import read_toml

#: sd-scripts' and older transformers' names of classes -> diffusers' and transformers'.
SAME_CLASS: Mapping[str, str] = {
    "CrossAttention": "Attention",
    "CLIPSdpaAttention": "CLIPAttention",
    "CLIPFlashAttention2": "CLIPAttention",
}

#: Classes of other architectures that LyCORIS' own presets list beside Stable Diffusion's. A
#: user's preset that was copied from one of them may keep them.
ELSEWHERE: frozenset[str] = frozenset(
    {
        "SelfAttention", "HunYuanDiTBlock", "DoubleStreamBlock", "SingleStreamBlock", "SingleDiTBlock",
        "MMDoubleStreamBlock", "MMSingleStreamBlock", "WanAttentionBlock", "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock", "JointTransformerBlock", "FinalLayer",
        "QwenImageTransformerBlock", "LensTransformerBlock", "Ideogram4TransformerBlock",
        "ZImageTransformerBlock", "AceStepEncoderLayer", "AceStepDiTLayer", "TextFusionBlock", "Block",
        "PatchEmbed", "LLMAdapterTransformerBlock", "MT5Block", "MT5LayerSelfAttention", "BertLayer",
        "BertAttention", "Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP",
        "Qwen3Attention", "Qwen3FlashAttention2", "Qwen3SdpaAttention", "Qwen3MLP",
    }
)  # fmt: skip

Overrides = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Where:
    """What is trained in one kind of network.

    Parameters
    ----------
    modules
        Class names: every layer inside a module of that class.
    names
        Patterns of paths: the layers themselves.
    """

    modules: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Preset:
    """A choice of layers.

    Parameters
    ----------
    name
        What the user gave: a preset's name or a file's.
    unet, text
        What is trained in the UNet and in the text encoders.
    enable_conv
        Whether convolutions with a kernel larger than one element are trained.
    exclude
        Patterns of paths that are left out.
    module_algo_map
        Class name to what layers inside are trained with; of nested classes the innermost counts.
    name_algo_map
        Pattern of paths to the same; it goes before classes, and the first that fits counts.
    shared
        Classes and patterns that are given for every network at once.
    use_fnmatch
        Patterns are shell patterns of whole paths, not regular expressions for their beginnings.
    is_file
        Whether it is a user's.
    """

    name: str
    unet: Where
    text: Where = field(default_factory=Where)
    enable_conv: bool = True
    exclude: tuple[str, ...] = ()
    module_algo_map: Mapping[str, Overrides] = field(default_factory=dict)
    name_algo_map: Mapping[str, Overrides] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    use_fnmatch: bool = False
    is_file: bool = False

    def matches(self, pattern: str, path: str) -> bool:
        """Whether a pattern fits a path, or is it."""
        if pattern == path:
            return True
        if self.use_fnmatch:
            return fnmatch.fnmatchcase(path, pattern)
        return re.match(pattern, path) is not None


_TRANSFORMER = ("Transformer2DModel",)
_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_ENDS = ("conv_in$", "conv_out$")
_TIME = (r"time_embedding\.linear_1$", r"time_embedding\.linear_2$")
_TEXT = Where(("CLIPAttention", "CLIPMLP"))
_ON_INPUT: Overrides = {"train_on_input": True}

#: LyCORIS' presets, with what each was meant to select where its code no longer does.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("full", Where(_TRANSFORMER + _CONVOLUTIONS, _ENDS + _TIME), _TEXT),
        Preset("full-lin", Where((*_TRANSFORMER, "ResnetBlock2D"), _TIME), _TEXT, enable_conv=False),
        Preset("attn-mlp", Where(_TRANSFORMER), _TEXT, enable_conv=False),
        Preset("attn-only", Where(("Attention",)), Where(("CLIPAttention",)), enable_conv=False),
        Preset("unet-only", Where(_TRANSFORMER + _CONVOLUTIONS, _ENDS + _TIME)),
        Preset("unet-transformer-only", Where(_TRANSFORMER), enable_conv=False),
        Preset("unet-convblock-only", Where(_CONVOLUTIONS, _ENDS)),
        Preset(
            "ia3",
            Where(names=(r".*\.to_k$", r".*\.to_v$", r".*\.ff\.net\.2$")),
            Where(names=(r".*\.k_proj$", r".*\.v_proj$", r".*\.mlp\.fc2$")),
            enable_conv=False,
            name_algo_map={r".*\.mlp\.fc2$": _ON_INPUT, r".*\.ff\.net\.2$": _ON_INPUT},
        ),
    )
}


def read_preset(name: str) -> Preset:
    """A preset by its name, or a user's by its file.

    Raises
    ------
    UsageError
        If there is no such preset or file.
    BadInputError
        If the file is not what LyCORIS would read: an unknown key, a wrong type, a pattern
        that is no regular expression.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".toml") and not Path(name).is_file():
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise UsageError(
            f"no preset is named {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(PRESETS)}; or a .toml file",
        )
    return _parsed(read_toml(name), name)


# --- LyCORIS' TOML format --------------------------------------------------------------------

_LISTS = (
    "unet_target_module",
    "unet_target_name",
    "text_encoder_target_module",
    "text_encoder_target_name",
    "target_module",
    "target_name",
    "exclude_name",
)
_SWITCHES = ("enable_conv", "use_fnmatch")
_MAPS = ("module_algo_map", "name_algo_map")


def _parsed(document: Mapping[str, object], path: str) -> Preset:
    if "lora_prefix" in document:
        raise BadInputError(
            "the names of an adapter's modules are fixed, so that every program finds them",
            path=path,
            key="lora_prefix",
            hint="take it out",
        )
    known = (*_LISTS, *_SWITCHES, *_MAPS)
    for key in document:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise BadInputError(
                "no such key in a preset",
                path=path,
                key=key,
                hint=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}",
            )
    lists = {key: _strings(document[key], path, key) for key in _LISTS if key in document}
    switches = {key: _switch(document[key], path, key) for key in _SWITCHES if key in document}
    maps = {key: _map(document[key], path, key) for key in _MAPS if key in document}
    _check_generic(lists, path)
    # What a file leaves out is as in `full`, as in LyCORIS.
    full = PRESETS["full"]
    preset = replace(
        full,
        name=path,
        unet=_where(full.unet, lists, "unet_", path),
        text=_where(full.text, lists, "text_encoder_", path),
        exclude=lists.get("exclude_name", ()),
        module_algo_map={
            _one_class(name, maps["module_algo_map"], path): values
            for name, values in maps.get("module_algo_map", {}).items()
        },
        name_algo_map=maps.get("name_algo_map", {}),
        shared=frozenset(
            SAME_CLASS.get(text, text)
            for key in ("target_module", "target_name")
            for text in lists.get(key, ())
        ),
        enable_conv=switches.get("enable_conv", True),
        use_fnmatch=switches.get("use_fnmatch", False),
        is_file=True,
    )
    if preset.use_fnmatch and "unet_target_name" not in lists and "target_name" not in lists:
        # What `full` brings are regular expressions; as shell patterns they are plain paths.
        plain = tuple(name.replace("\\", "").rstrip("$") for name in full.unet.names)
        preset = replace(preset, unet=replace(preset.unet, names=plain))
    if not preset.use_fnmatch:
        _check_patterns(preset, path)
    return preset


def _check_generic(lists: Mapping[str, tuple[str, ...]], path: str) -> None:
    """`target_module` and `target_name` are for every network, so they stand alone."""
    for kind in ("module", "name"):
        own = [key for key in (f"unet_target_{kind}", f"text_encoder_target_{kind}") if key in lists]
        if f"target_{kind}" in lists and own:
            raise BadInputError(
                f"stands beside {own[0]}, which says the same", path=path, key=f"target_{kind}"
            )


def _where(default: Where, lists: Mapping[str, tuple[str, ...]], prefix: str, path: str) -> Where:
    """What a file says of one kind of network.

    `target_module` and `target_name` are LyCORIS' keys for networks of any kind: with one of
    them nothing comes from the default.
    """
    is_generic = "target_module" in lists or "target_name" in lists
    modules = lists.get("target_module", () if is_generic else default.modules)
    names = lists.get("target_name", () if is_generic else default.names)
    modules = lists.get(f"{prefix}target_module", modules)
    canonical = tuple(dict.fromkeys(SAME_CLASS.get(name, name) for name in modules))
    return Where(canonical, lists.get(f"{prefix}target_name", names))


def _one_class(name: str, entries: Iterable[str], path: str) -> str:
    canonical = SAME_CLASS.get(name, name)
    same = [other for other in entries if SAME_CLASS.get(other, other) == canonical]
    if len(same) > 1:
        raise BadInputError(f"{' and '.join(same)} are one class", path=path, key="module_algo_map")
    return canonical


def _check_patterns(preset: Preset, path: str) -> None:
    places: Mapping[str, Iterable[str]] = {
        "target_name": (*preset.unet.names, *preset.text.names),
        "exclude_name": preset.exclude,
        "name_algo_map": preset.name_algo_map,
    }
    for key, patterns in places.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInputError(
                    f"{pattern!r} is no regular expression: {error}",
                    path=path,
                    key=key,
                    hint="for shell patterns such as `*.to_k` set use_fnmatch = true",
                ) from None


def _strings(value: object, path: str, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise BadInputError(f"is {value!r}, expected a list of texts", path=path, key=key)
    return tuple(value)


def _switch(value: object, path: str, key: str) -> bool:
    if not isinstance(value, bool):
        raise BadInputError(f"is {value!r}, expected true or false", path=path, key=key)
    return value


def _map(value: object, path: str, key: str) -> dict[str, Overrides]:
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise BadInputError(
            "is no table of tables", path=path, key=key, hint=f"write [{key}.NAME] and the values below it"
        )
    return value
