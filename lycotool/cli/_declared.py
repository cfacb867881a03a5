"""Command-line options made from declarations, so that each is declared once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer

from lycotool.training.declare import Declared


def parameters(options: Iterable[Declared]) -> list[inspect.Parameter]:
    """One keyword parameter per option, as Typer reads them.

    Every default is None, which means "not given": a configuration file then decides. What
    the default really is stands in the help.
    """
    return [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_type(entry), _option(entry)],
        )
        for entry in options
    ]


def _type(entry: Declared) -> Any:  # noqa: ANN401 - a type
    kind: Any = entry.kind
    if entry.choices and kind is str:
        kind = Literal[entry.choices]
    elif entry.count is None:
        kind = list[entry.kind]  # type: ignore[name-defined]
    elif entry.count > 1:
        kind = str
    return kind | None


def _option(entry: Declared) -> Any:  # noqa: ANN401 - Typer's own type is not public
    flag = entry.flag
    if entry.kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return typer.Option(
        *entry.flags,
        flag,
        help=described(entry),
        metavar=entry.metavar or _metavar(entry),
        rich_help_panel=entry.panel,
        show_default=False,
    )


def _metavar(entry: Declared) -> str | None:
    if entry.choices and entry.kind is not str:
        return "|".join(map(str, entry.choices))
    if entry.count not in (1, None):
        return "N|W,H"
    return None


def described(entry: Declared) -> str:
    """The help, with unit and default."""
    notes = [entry.unit] if entry.unit else []
    if entry.kind is bool and entry.default is not None:
        notes.append("default: on" if entry.default else "default: off")
    elif entry.default not in (None, (), ""):
        notes.append(f"default: {entry.default:g}" if entry.kind is float else f"default: {entry.default}")
    elif "efault " not in entry.help:
        notes.append("default: none")
    return f"{entry.help} [{'; '.join(notes)}]" if notes else entry.help
