"""Options as a TOML file: strict reading, and writing that reads back equal.

A file has ``base``, ``dataset`` and ``output`` at its top and one table per group of
:class:`lycotool.training.options.TrainOptions`::

    base = "model.safetensors"

    [network]
    algo = "lokr"

Keys are the names of the command line's options with underscores. A key may also stand at the
top, outside of its table. An option that is None is left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from lycotool.errors import UsageError
from lycotool.io.toml import read_toml
from lycotool.training.declare import Declared, declared
from lycotool.training.options import TrainOptions

#: What stands at the top of a file: what is trained on what, and where it goes.
TOP = ("base", "dataset", "output")


@cache
def groups() -> dict[str, type]:
    """The groups of options by name, in order."""
    hints = typing.get_type_hints(TrainOptions)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


@cache
def all_options() -> dict[str, Declared]:
    """Every option by name."""
    found: dict[str, Declared] = {}
    for group, cls in groups().items():
        for entry in declared(cls, group):
            if entry.name in found:
                raise TypeError(f"two options are called {entry.name}")
            found[entry.name] = entry
    return found


def build(values: Mapping[str, Any]) -> TrainOptions:
    """Options from values by name; what is missing has its default.

    Raises
    ------
    UsageError
        If base or dataset is missing, or a value is out of its range.
    """
    for name in ("base", "dataset"):
        if not values.get(name):
            raise UsageError(
                f"missing argument {name.upper()}",
                hint=f"name it on the command line, or as `{name}` in the config file",
            )
    known = all_options()
    parts: dict[str, dict[str, Any]] = {group: {} for group in groups()}
    for name, value in values.items():
        if name not in TOP:
            parts[known[name].group][name] = _in_range(known[name], value)
    made: dict[str, Any] = {group: cls(**parts[group]) for group, cls in groups().items()}
    made |= {name: values.get(name) for name in TOP}
    return TrainOptions(**made)


def read_config(path: str) -> dict[str, Any]:
    """The values of a configuration file by option name.

    Raises
    ------
    UsageError
        Listing every key that is unknown, with the nearest name, and every value of another type.
    """
    document = read_toml(path)
    values: dict[str, Any] = {}
    faults: list[str] = []
    for key, value in document.items():
        if key in groups() and isinstance(value, dict):
            for name, inner in value.items():
                entry = all_options().get(name)
                if entry is not None and entry.group != key:
                    faults.append(f"[{key}] {name}: belongs into [{entry.group}]")
                else:
                    _take(name, inner, values, faults, f"[{key}] ")
        else:
            _take(key, value, values, faults, "")
    if faults:
        raise UsageError(
            f"{len(faults)} keys are not understood" if len(faults) > 1 else "one key is not understood",
            path=path,
            details=faults,
            hint="`--kohya-config` reads the files of sd-scripts",
        )
    return values


def _take(name: str, value: object, values: dict[str, Any], faults: list[str], place: str) -> None:
    if name in TOP and not place:
        if not isinstance(value, str):
            faults.append(f"{name}: expected text")
        values[name] = value
        return
    entry = all_options().get(name)
    if entry is None:
        faults.append(f"{place}{name}: unknown{nearest(name, [*all_options(), *TOP, *groups()])}")
    elif name in values:
        faults.append(f"{place}{name}: given twice")
    else:
        try:
            values[name] = convert(entry, value)
        except UsageError as error:
            faults.append(f"{place}{name}: {error.message}")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """``; did you mean …?`` where a name is near."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def convert(entry: Declared, value: object) -> Any:  # noqa: ANN401 - the option's type
    """A value of a file, or text of the command line, as the option's type.

    Raises
    ------
    UsageError
        If it is of another type.
    """
    if entry.count == 1:
        return _convert_one(entry, value)
    given = value
    if isinstance(value, str) and entry.count is not None:
        value = value.lower().replace("x", ",").split(",")
    elif not isinstance(value, list | tuple):
        value = [value]
    try:
        items = [_convert_one(entry, item) for item in value]
    except UsageError as error:
        if given is value:
            raise
        raise UsageError(
            f"{given!r}, expected {_article(entry.kind)} or {entry.count}, such as 768,512"
        ) from error
    if entry.count is not None:
        if len(items) == 1:
            items *= entry.count
        if len(items) != entry.count:
            raise UsageError(f"{len(items)} values, expected 1 or {entry.count}")
    return tuple(items)


def _convert_one(entry: Declared, value: object) -> Any:  # noqa: ANN401 - the option's type
    kind = entry.kind
    if isinstance(value, str) and kind in (int, float):
        try:
            value = kind(value.strip())
        except ValueError:
            raise UsageError(f"{value!r}, expected {_article(kind)}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and type(value) is int:
        value = str(value)
    if type(value) is not kind:
        raise UsageError(f"{value!r}, expected {_article(kind)}")
    if entry.choices and value not in entry.choices:
        shown = ", ".join(map(str, entry.choices))
        raise UsageError(f"{value!r}, expected one of {shown}")
    return value


def _article(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _in_range(entry: Declared, value: Any) -> Any:  # noqa: ANN401 - the option's type
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high = entry.minimum, entry.maximum
        if (
            not math.isfinite(number)
            or (low is not None and number < low)
            or (high is not None and number > high)
        ):
            unit = f" {entry.unit}" if entry.unit else ""
            upper = "" if high is None else f" and at most {high:g}"
            demand = "a finite number" if low is None else f"at least {low:g}{upper}{unit}"
            raise UsageError(f"{entry.flag} is {number:g}, expected {demand}")
    return value


def to_toml(options: TrainOptions) -> str:
    """A file that :func:`read_config` reads back as the same options."""
    lines = [
        f"{name} = {_toml(getattr(options, name))}" for name in TOP if getattr(options, name) is not None
    ]
    for group, cls in groups().items():
        held = getattr(options, group)
        entries = [(entry.name, getattr(held, entry.name)) for entry in declared(cls, group)]
        shown = [f"{name} = {_toml(value)}" for name, value in entries if value is not None]
        lines += ["", f"[{group}]", *shown]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:  # noqa: ANN401 - any option's value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
