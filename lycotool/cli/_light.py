"""Commands whose arguments are read without the validation library Typer brings.

Typer has Pydantic convert every value, also those that need no conversion: text stays text, and a
default is what it is. Importing Pydantic takes as long as importing all the rest of Typer, so here
only values that are refused, or are more than text and plain numbers, go that way.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand, TyperGroup

#: Numbers that everybody writes and reads alike; of others Typer's way has to say what they are.
_PLAIN: dict[type[int] | type[float], re.Pattern[str]] = {
    int: re.compile(r"-?[0-9]{1,15}"),
    float: re.compile(r"-?[0-9]{1,15}([.][0-9]{1,15})?(e-?[0-9]{1,2})?"),
}


class LightCommand(TyperCommand):
    """A command that converts only what needs it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - Typer's own, not public
        """Read the arguments."""
        _lighten(self.get_params(ctx))
        return super().parse_args(ctx, args)


class LightGroup(TyperGroup):
    """A group of commands that converts only what needs it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - Typer's own, not public
        """Read the arguments before the command's name."""
        _lighten(self.get_params(ctx))
        return super().parse_args(ctx, args)


def _lighten(parameters: list[Any]) -> None:
    for parameter in parameters:
        ordinary = parameter.process_value
        if not isinstance(ordinary, functools.partial):
            parameter.process_value = functools.partial(_processed, parameter, ordinary)


def _processed(parameter: Any, ordinary: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:  # noqa: ANN401
    """What Typer makes of a value; the value itself where that is what it would make."""
    # Without this attribute, as in other versions of Typer, everything takes the ordinary way.
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    is_several = parameter.multiple or parameter.nargs != 1
    if annotation in _PLAIN and not _is_limited(parameter):
        value = _number(annotation, value)
    if annotation is None or not _is_final(annotation, value, is_several, parameter.required):
        return ordinary(context, value)
    if is_several:
        value = list(value or ()) or ()
    return value if parameter.callback is None else parameter.callback(context, parameter, value)


def _is_limited(parameter: Any) -> bool:  # noqa: ANN401
    """Whether there may be numbers that are refused."""
    info = getattr(parameter.type_descriptor, "parameter_info", None)
    return info is None or info.min is not None or info.max is not None


def _number(kind: type[int] | type[float], value: object) -> object:
    """A plain number instead of its text."""
    return kind(value) if type(value) is str and _PLAIN[kind].fullmatch(value) else value


def _is_final(annotation: object, value: object, is_several: bool, is_required: bool) -> bool:
    """Whether converting the value would change nothing, and nothing is wrong with it."""
    if not value and is_required:
        return False
    if value is None:
        return True
    if is_several:
        is_texts = annotation == list[str] and isinstance(value, list | tuple)
        return is_texts and all(type(text) is str for text in value)  # type: ignore[attr-defined]
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    # Text given for a number is converted; a number here is a default.
    return annotation in (str, int, float, bool) and type(value) is annotation
