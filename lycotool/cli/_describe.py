"""The command line as data: what completions and the reference pages are made from.

Read from the signatures of the commands, as Typer reads them, so that nothing is written twice.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union

import typer

#: What a value is when it is a path: files that models are in, folders, or anything.
Kind = Literal["model", "any", "folder", "config", "none"]

#: The kind of value behind each metavar that stands for a path.
_PATHS: dict[str, Kind] = {
    "BASE": "model", "CHECKPOINT": "model", "CKPT": "model", "ADAPTER": "model", "TUNED": "model",
    "VAE": "model", "ADAPTER[:W]": "model", "OUTPUT": "model",
    "DATASET": "config", "FILE.toml": "config", "NAME|FILE": "config", "LIST|PRESET|FILE": "config",
    "PATH": "any", "FILE": "any", "FILE.png|FILE.svg|-": "any",
    "DIR": "folder", "FOLDER": "folder",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """An option or an argument.

    ``flags`` is empty for an argument; ``negative`` are the flags that say no; ``words`` are values to offer, ``choices``
    the only ones there are. ``default`` is as the help shows it, empty where there is none.
    """

    name: str
    flags: tuple[str, ...]
    negative: tuple[str, ...]
    metavar: str
    help: str
    panel: str
    choices: tuple[str, ...]
    words: tuple[str, ...]
    default: str
    is_flag: bool
    required: bool
    several: bool
    kind: Kind


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One command: its name, first sentence, whole text, examples and parameters."""

    name: str
    summary: str
    text: str
    examples: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def options(self) -> tuple[Parameter, ...]:
        """What is given by name."""
        return tuple(p for p in self.parameters if p.flags)

    @property
    def arguments(self) -> tuple[Parameter, ...]:
        """What is given by position."""
        return tuple(p for p in self.parameters if not p.flags)


def commands(app: typer.Typer) -> tuple[CommandLine, ...]:
    """Every command, in the order of ``--help``."""
    found = []
    for entry in app.registered_commands:
        callback = entry.callback
        if callback is None:
            continue
        text = inspect.cleandoc(callback.__doc__ or "")
        epilog = entry.epilog if isinstance(entry.epilog, str) else ""
        examples = tuple(line for line in epilog.splitlines() if line.startswith("lycotool"))
        found.append(
            CommandLine(
                name=entry.name or callback.__name__,
                summary=" ".join(text.split("\n\n")[0].split()),
                text=text,
                examples=examples,
                parameters=parameters(callback),
            )
        )
    return tuple(found)


def parameters(callback: Callable[..., object]) -> tuple[Parameter, ...]:
    """The parameters of a command's function."""
    signature = inspect.signature(callback, eval_str=True)
    return tuple(
        _parameter(parameter.name, typing.get_args(parameter.annotation), parameter.default)
        for parameter in signature.parameters.values()
        if typing.get_origin(parameter.annotation) is typing.Annotated
    )


def _parameter(name: str, annotation: tuple[Any, ...], default: Any) -> Parameter:  # noqa: ANN401 - Typer's own are not public
    hint, info = annotation[:2]
    base, several = _value_type(hint)
    # In `Annotated`, Typer takes the first flag for the default it is not.
    declared = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    flags, negative = [], []
    for text in declared:
        positive, _, no = text.partition("/")
        flags.append(positive)
        if no:
            negative.append(no)
    choices = tuple(map(str, typing.get_args(base))) if typing.get_origin(base) is Literal else ()
    metavar = info.metavar or ("" if base is bool else "|".join(choices) or _METAVARS.get(base, name.upper()))
    return Parameter(
        name=name,
        flags=tuple(flags),
        negative=tuple(negative),
        metavar=metavar,
        help=info.help or "",
        panel=info.rich_help_panel or "Options",
        choices=choices,
        words=choices or _words(name, metavar),
        default=_default(info, default, base),
        is_flag=base is bool,
        required=default is inspect.Parameter.empty,
        several=several,
        kind="none" if choices or base is bool else _kind(metavar, option=bool(flags)),
    )


def _kind(metavar: str, *, option: bool) -> Kind:
    """What an option calls FILE can be any; the FILE a command is about is a model."""
    return "model" if metavar == "FILE" and not option else _PATHS.get(metavar, "none")


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _value_type(hint: Any) -> tuple[Any, bool]:  # noqa: ANN401 - a type
    """The type of one value, and whether there can be several."""
    if typing.get_origin(hint) in (types.UnionType, Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _default(info: Any, default: Any, base: Any) -> str:  # noqa: ANN401
    if isinstance(info.show_default, str):
        return info.show_default
    if default is None or default is inspect.Parameter.empty or info.show_default is False or base is bool:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _words(name: str, metavar: str) -> tuple[str, ...]:
    """Values worth offering where others are possible too."""
    if metavar.startswith("auto|cpu"):
        return tuple(word.removesuffix("[:N]") for word in metavar.split("|"))
    if name == "preset":
        return _presets()
    if name == "lbw":
        from lycotool.models.block_weights import PRESETS

        return tuple(PRESETS)
    if name == "optimizer":
        from lycotool.training.optimizers.known import KNOWN

        return tuple(KNOWN)
    if metavar == "FORMAT":
        from lycotool.formats.dialects import DIALECTS

        return tuple(DIALECTS)
    return ()


@functools.cache
def _presets() -> tuple[str, ...]:
    from lycotool.training.presets import PRESETS

    return tuple(PRESETS)
