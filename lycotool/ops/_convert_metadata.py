"""Metadata and configuration that are true for a converted adapter."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from lycotool.errors import IncompatibleError
from lycotool.formats.dialects import Dialect
from lycotool.models.families.base import Family
from lycotool.ops._adapter import Adapter
from lycotool.ops._common import provenance
from lycotool.ops._convert_forms import Form
from lycotool.ops._convert_render import Rendered
from lycotool.ops._render import STALE_METADATA

_T = TypeVar("_T")

#: What LyCORIS calls a registry algorithm in its arguments, where the names differ.
_LYCORIS_NAMES = {"lora": "locon", "norm": "full"}

#: What only sd-scripts and LyCORIS write, about ranks and scales that dialects change.
_NETWORK_METADATA = frozenset({
    "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"
})  # fmt: skip

_PEFT_PREFIX = "base_model.model."
_PEFT_KINDS = {"loha": "LOHA"}


def metadata_for(
    adapter: Adapter, families: Sequence[Family], dialect: Dialect, made: Sequence[tuple[Form, Rendered]]
) -> dict[str, str]:
    """The input's metadata, with what readers of the target go by.

    ``ss_network_dim`` and ``ss_network_alpha`` are those of the linear modules, ``conv_dim``
    and ``conv_alpha`` those of kernels larger than 1; ``Dynamic`` where they differ.

    Parameters
    ----------
    families
        Those it can be for; more than one have their names in common, nothing else.
    """
    kept = {key: value for key, value in adapter.store.metadata.items() if key not in STALE_METADATA}
    recipe = {"file": Path(adapter.path).name, "to": dialect.name}
    kept |= provenance("convert", json.dumps(recipe))
    if not dialect.network_module:
        return {key: value for key, value in kept.items() if key not in _NETWORK_METADATA}
    linear = [r for form, r in made if r.rank is not None and not _is_convolution(form)]
    convs = [r for form, r in made if r.rank is not None and _is_convolution(form)]
    kept["ss_network_module"] = _network_module(dialect, families[0])
    if linear or convs:
        kept["ss_network_dim"] = _common([str(r.rank) for r in linear or convs])
        kept["ss_network_alpha"] = _common([f"{r.alpha:g}" for r in linear or convs])
    arguments = _arguments(adapter)
    for stale in ("algo", "conv_dim", "conv_alpha", "use_tucker", "use_conv_cp", "disable_conv_cp", "use_cp"):
        arguments.pop(stale, None)
    if convs:
        arguments["conv_dim"] = _common([str(r.rank) for r in convs])
        arguments["conv_alpha"] = _common([f"{r.alpha:g}" for r in convs])
    if dialect.network_module == "lycoris.kohya":
        names = Counter(form.detected.algorithm.name for form, _ in made)
        main = names.most_common(1)[0][0]
        arguments["algo"] = _LYCORIS_NAMES.get(main, main)
        if any(form.detected.layout.use_conv_cp for form, _ in made):
            arguments["use_tucker"] = "True"
    else:
        for option in ("dora_wd", "wd_on_output", "factor", "preset", "rs_lora"):
            arguments.pop(option, None)
    kept["ss_network_args"] = json.dumps(arguments)
    if len(families) == 1 and families[0].base_model_version:
        kept.setdefault("ss_base_model_version", families[0].base_model_version)
    return kept


def _network_module(dialect: Dialect, family: Family) -> str:
    """sd-scripts has a module of its own for some families."""
    if dialect.network_module != "networks.lora":
        return dialect.network_module
    ending = {"Flux.1": "_flux", "Chroma": "_flux", "SD 3": "_sd3", "Lumina 2": "_lumina", "Wan": "_wan"}
    return dialect.network_module + ending.get(family.name, "")


def _arguments(adapter: Adapter) -> dict[str, object]:
    try:
        found = json.loads(adapter.store.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else "Dynamic"


def _is_convolution(form: Form) -> bool:
    return any(size > 1 for size in form.kernel)


def peft_config(made: Sequence[tuple[str, Form, Rendered]], adapter: Adapter) -> str:
    """``adapter_config.json`` for the modules of one network.

    Ranks and alphas other than the commonest stand in patterns, by the module's whole path.

    Raises
    ------
    IncompatibleError
        If the modules are of more than one kind: a configuration has one for all.
    """
    kinds = {_PEFT_KINDS.get(form.detected.algorithm.name, "LORA") for _, form, _ in made}
    with_dora = sum(form.detected.dora_slot is not None for _, form, _ in made)
    if len(kinds) > 1 or with_dora not in (0, len(made)):
        found = Counter(form.detected.label for _, form, _ in made)
        raise IncompatibleError(
            "a PEFT folder has one kind of module for all",
            path=adapter.path,
            details=[f"{count} {label}" for label, count in found.items()],
            hint="`--algo lora` makes them one kind",
        )
    kind = kinds.pop()
    paths = [name.removeprefix(_PEFT_PREFIX) for name, _, _ in made]
    ranks = {path: r.rank for path, (_, _, r) in zip(paths, made, strict=True) if r.rank is not None}
    alphas = {path: r.alpha for path, (_, _, r) in zip(paths, made, strict=True) if r.alpha is not None}
    rank = _commonest(ranks.values(), 1)
    alpha = _commonest(alphas.values(), 1.0)
    config: dict[str, object] = {
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha" if kind == "LORA" else "alpha": alpha,
        "rank_pattern": {_pattern(p, paths): value for p, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(p, paths): value for p, value in alphas.items() if value != alpha},
        # A list would match the ends of other modules' names; an expression has to match the whole.
        "target_modules": "|".join(re.escape(path) for path in paths),
    }
    if kind == "LORA":
        config |= {"use_dora": bool(with_dora), "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _commonest(values: Iterable[_T], default: _T) -> _T:
    return max(Counter(values).items(), key=lambda item: item[1], default=(default, 0))[0]


def _pattern(path: str, paths: Iterable[str]) -> str:
    """PEFT matches a pattern with the end of a path; of a path that is another's end, with all of it."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path
