"""One declaration per option: its type, default, help, unit and the names others have for it.

Options are fields of frozen dataclasses; everything else about them is read from there: the
command line's option, the key of a configuration file, the name sd-scripts has, the
documentation. What is said of an option is the field's metadata, with the keys of
:func:`option`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union


def option(
    default: Any,  # noqa: ANN401 - any field's default
    panel: str,
    help: str,
    *,
    unit: str = "",
    kohya: str | Sequence[str] = (),
    metavar: str = "",
    flags: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:  # noqa: ANN401 - as `dataclasses.field`
    """A field of an options dataclass.

    Parameters
    ----------
    panel
        The heading it stands under in ``--help``.
    help
        One sentence; a default that the value does not tell is named in it.
    unit
        What a number counts, such as ``steps``.
    kohya
        The names sd-scripts has for an option of this meaning and these values.
    metavar
        What stands for the value in ``--help``.
    flags
        Short names on the command line.
    minimum, maximum
        The range of a number, both inclusive.
    """
    about = {
        "panel": panel,
        "help": help,
        "unit": unit,
        "kohya": kohya,
        "metavar": metavar,
        "flags": tuple(flags),
        "minimum": minimum,
        "maximum": maximum,
    }
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True, slots=True)
class Declared:
    """An option as it was declared.

    Attributes
    ----------
    name
        Of the field; with dashes on the command line.
    group
        Of the field of the whole that holds it; the table of a configuration file.
    kind
        ``bool``, ``int``, ``float`` or ``str``.
    choices
        The values a ``Literal`` allows.
    count
        How many values: 1, a fixed number more, or None for any number (a list in a file, given
        several times on the command line).
    optional
        Whether None is a value.
    """

    name: str
    group: str
    default: Any
    panel: str
    help: str
    unit: str
    kohya: tuple[str, ...]
    metavar: str
    flags: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    kind: type
    choices: tuple[Any, ...]
    count: int | None
    optional: bool

    @property
    def flag(self) -> str:
        """As it is typed: ``--max-grad-norm``."""
        return "--" + self.name.replace("_", "-")


def declared(cls: type, group: str) -> tuple[Declared, ...]:
    """The options of a dataclass, in order; fields without ``help`` are not options."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        about = field.metadata
        if "help" not in about:
            continue
        kohya = about.get("kohya") or ()
        kind, choices, count, optional = _read_type(hints[field.name])
        found.append(
            Declared(
                name=field.name,
                group=group,
                default=field.default,
                panel=about.get("panel", ""),
                help=about["help"],
                unit=about.get("unit", ""),
                kohya=(kohya,) if isinstance(kohya, str) else tuple(kohya),
                metavar=about.get("metavar", ""),
                flags=tuple(about.get("flags", ())),
                minimum=about.get("minimum"),
                maximum=about.get("maximum"),
                kind=kind,
                choices=choices,
                count=count,
                optional=optional,
            )
        )
    return tuple(found)


def _read_type(hint: Any) -> tuple[type, tuple[Any, ...], int | None, bool]:  # noqa: ANN401 - a type
    optional = False
    count: int | None = 1
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(inner) != 1:
            raise TypeError(hint)
        optional, hint = True, inner[0]
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        count, hint = (None if parts[-1] is Ellipsis else len(parts)), parts[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices, count, optional
    if hint not in (bool, int, float, str):
        raise TypeError(hint)
    return hint, (), count, optional
