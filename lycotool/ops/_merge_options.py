"""The options of `merge` by the names people give them, on the command line and in recipes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from lycotool.algorithms.base import Reading
from lycotool.errors import UsageError
from lycotool.linalg.merging.base import Along, Consensus, Normalize
from lycotool.linalg.merging.methods import METHODS
from lycotool.ops._methods import MethodOptions
from lycotool.ops._sizes import parse_size
from lycotool.ops._strengths import StrengthOptions
from lycotool.ops._truncate import RankOptions
from lycotool.ops.bake import BakeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions(BakeOptions):
    """What `merge` has beside the common options.

    ``rebuild`` overrides the registry's rules. ``base`` is a checkpoint for algorithms whose
    change depends on it. ``metadata`` says whose metadata an adapter merge keeps; None is
    ``first``. ``compat`` ``kohya`` repeats sd-scripts' sums of factors, with ``concat`` its
    concatenation. ``title`` is a checkpoint's ``modelspec.title``; None is the output's name.
    """

    rebuild: bool = False
    base: str | None = None
    metadata: Literal["first", "union", "none"] | None = None
    compat: Literal["none", "kohya"] = "none"
    concat: bool = False
    title: str | None = None
    method: MethodOptions = field(default_factory=MethodOptions)
    ranks: RankOptions = field(default_factory=RankOptions)


Group = Literal["merge", "reading", "strengths", "method", "ranks"]


@dataclass(frozen=True, slots=True)
class Option:
    """Where an option's value goes, and what it must be.

    Attributes
    ----------
    kind
        The type of its value; ``size`` is a number of bytes or a text such as ``32MB``.
    is_path
        Whether it names a file.
    changes_result
        Whether the bytes of the result depend on it.
    """

    group: Group
    field: str
    kind: Literal["text", "switch", "integer", "number", "texts", "size"] = "text"
    choices: tuple[str, ...] = ()
    is_path: bool = False
    changes_result: bool = True


#: What a value must be, in words and in types.
_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "text": ("a text", (str,)),
    "switch": ("true or false", (bool,)),
    "integer": ("a whole number", (int,)),
    "number": ("a number", (int, float)),
    "texts": ("a list of texts", (list, tuple)),
    "size": ("a number of bytes or a text such as 32MB", (int, str)),
}


def _choices(literal: object) -> tuple[str, ...]:
    return tuple(get_args(literal))


#: Every option of `merge` that says what is merged, and how; reports have theirs beside them.
OPTIONS: Mapping[str, Option] = {
    "output": Option("merge", "output", is_path=True, changes_result=False),
    "force": Option("merge", "force", "switch", changes_result=False),
    "dtype": Option("merge", "dtype"),
    "shard-size": Option("merge", "shard_size", "size"),
    "vae": Option("merge", "vae", is_path=True),
    "verify": Option("merge", "verify", "switch", changes_result=False),
    "device": Option("merge", "device", changes_result=False),
    "strict": Option("merge", "strict", "switch", changes_result=False),
    "dry-run": Option("merge", "dry_run", "switch", changes_result=False),
    "allow-pickle": Option("merge", "allow_pickle", "switch", changes_result=False),
    "rebuild": Option("merge", "rebuild", "switch"),
    "base": Option("merge", "base", is_path=True),
    "compat": Option("merge", "compat", choices=("none", "kohya")),
    "concat": Option("merge", "concat", "switch"),
    "title": Option("merge", "title"),
    "metadata": Option("merge", "metadata", choices=("first", "union", "none")),
    "method": Option("method", "method", choices=tuple(METHODS)),
    "density": Option("method", "density", "number"),
    "gamma": Option("method", "gamma", "number"),
    "epsilon": Option("method", "epsilon", "number"),
    "lambda": Option("method", "scale", "number"),
    "normalize": Option("method", "normalize", choices=_choices(Normalize)),
    "consensus": Option("method", "consensus", choices=_choices(Consensus)),
    "t": Option("method", "t", "number"),
    "along": Option("method", "along", choices=_choices(Along)),
    "seed": Option("method", "seed", "integer"),
    "rank": Option("ranks", "rank", "integer"),
    "conv-rank": Option("ranks", "conv_rank", "integer"),
    "size": Option("ranks", "size", "size"),
    "error": Option("ranks", "error", "number"),
    "te": Option("strengths", "te", "number"),
    "unet": Option("strengths", "unet", "number"),
    "lbw": Option("strengths", "lbw"),
    "lbw-rule": Option("strengths", "lbw_rules", "texts"),
    "alpha-zero": Option("reading", "alpha_zero", choices=("zero", "rank")),
    "dora-strength": Option("reading", "dora_strength", choices=("linear", "lycoris", "peft")),
    "dylora-block-size": Option("reading", "dylora_block_size", "integer"),
    "legacy-loha-cp": Option("reading", "loha_cp_shared_core", "switch"),
    "glora-old-scale": Option("reading", "glora_old_scale", choices=("once", "twice")),
}


def merge_options(values: Mapping[str, object]) -> MergeOptions:
    """Options from values by name; what is not there, or None, has its default.

    Raises
    ------
    UsageError
        If there is no such option, or a value is not what it must be.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in _choices(Group)}
    for name, value in values.items():
        option = OPTIONS.get(name)
        if option is None:
            raise unknown(name, OPTIONS)
        if value is not None:
            found[option.group][option.field] = _checked(name, option, value)
    return MergeOptions(
        **found["merge"],
        reading=Reading(**found["reading"]),
        strengths=StrengthOptions(**found["strengths"]),
        method=MethodOptions(**found["method"]),
        ranks=RankOptions(**found["ranks"]),
    )


def values_of(options: MergeOptions) -> dict[str, object]:
    """The inverse of :func:`merge_options`: what differs from the default, by name."""
    groups: Mapping[Group, object] = {
        "merge": options,
        "reading": options.reading,
        "strengths": options.strengths,
        "method": options.method,
        "ranks": options.ranks,
    }
    found: dict[str, object] = {}
    for name, option in OPTIONS.items():
        group = groups[option.group]
        value = getattr(group, option.field)
        default = next(f.default for f in fields(cast("Any", group)) if f.name == option.field)
        if value != default:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def unknown(name: str, known: Mapping[str, object] | tuple[str, ...]) -> UsageError:
    """There is no such name; here is the nearest."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
    return UsageError(f"no such key: {name}", hint=f"did you mean {near[0]}?" if near else None)


def _checked(name: str, option: Option, value: object) -> object:
    """The value as its field holds it.

    Raises
    ------
    UsageError
        If it has another type, or is none of the choices.
    """
    text, types = _KINDS[option.kind]
    if not isinstance(value, types) or (isinstance(value, bool) and option.kind != "switch"):
        raise UsageError(f"{name} is {value!r}, expected {text}")
    if option.kind == "size":
        return parse_size(str(value))
    if option.kind == "number":
        return float(cast("float", value))
    if option.kind == "texts":
        items = tuple(cast("list[object]", value))
        if not all(isinstance(item, str) for item in items):
            raise UsageError(f"{name} is {value!r}, expected {text}")
        return items
    if option.choices and value not in option.choices:
        raise UsageError(f"{name} is {value!r}, expected one of " + ", ".join(option.choices))
    return value
