"""Command-line options made from declarations, so that each is declared once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer

from lycotool.cli._light import LightCommand
from lycotool.training.declare import Declared


class GroupedCommand(LightCommand):
    """A command whose help has a section for each panel, and whose errors name the nearest choice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - Typer's own, not public
        """Read the arguments; a value that is no choice is answered with the one it resembles."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = _with_nearest(error.message)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - Typer's own, not public
        """Write one section after the other, in the order they first appear."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Options" if parameter.param_type_name == "option" else "Arguments"
                panel = getattr(parameter, "rich_help_panel", None) or default
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def _with_nearest(message: str) -> str:
    """A parser's message in our words, with the choice that was probably meant.

    >>> _with_nearest("Value error, 'tiess' is not one of 'exact', 'ties'.")
    "'tiess' is not one of 'exact', 'ties'. Did you mean 'ties'?"
    """
    import difflib

    message = message.removeprefix("Value error, ").replace("Input should be a valid", "expected a valid")
    given, separator, choices = message.partition(" is not one of ")
    near = (
        difflib.get_close_matches(given.strip("'"), re.findall(r"'([^']*)'", choices), 1) if separator else []
    )
    return f"{message} Did you mean '{near[0]}'?" if near else message


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
        notes.append("default on" if entry.default else "default off")
    elif entry.default not in (None, ()):
        notes.append(f"default {entry.default:g}" if entry.kind is float else f"default {entry.default}")
    return f"{entry.help} [{'; '.join(notes)}]" if notes else entry.help
