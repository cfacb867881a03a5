"""Arguments of optimizers as users write them, ``name=value``, read by the class's own signature."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Mapping, Sequence

from lycotool.errors import UsageError

#: What a caller sets itself, and what is no argument.
_NOT_ARGUMENTS = frozenset({"self", "params", "lr", "closure"})


def read_arguments(pairs: Sequence[str], accepted: Mapping[str, object], *, what: str) -> dict[str, object]:
    """``name=value`` pairs as values of the accepted arguments' types.

    Parameters
    ----------
    accepted
        Arguments and their defaults. The default's type decides: a bool is ``true`` or ``false``, a
        tuple is numbers with commas, None leaves any Python literal.
    what
        Whose arguments they are, for messages.

    Raises
    ------
    UsageError
        If a pair has no ``=``, comes twice, is not known, or its value cannot be read.
    """
    values: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"{pair!r} is no argument of {what}", hint="write name=value")
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, 1)
            known = ", ".join(sorted(accepted)) or "it takes none"
            raise UsageError(
                f"{what} has no argument {name}",
                hint=f"did you mean {close[0]}?" if close else f"known: {known}",
            )
        if name in values:
            raise UsageError(f"{name} is given twice to {what}")
        values[name] = _read(text, accepted[name], name, what)
    return values


def accepted_by(cls: type) -> dict[str, object]:
    """The keyword arguments of a class with their defaults, without parameters and learning rate."""
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in _NOT_ARGUMENTS:
            continue
        found[name] = None if parameter.default is parameter.empty else parameter.default
    return found


def _read(text: str, default: object, name: str, what: str) -> object:
    lowered = text.lower()
    if isinstance(default, bool):
        if lowered not in ("true", "false"):
            raise UsageError(f"{name} of {what} is {text!r}, expected true or false")
        return lowered == "true"
    if isinstance(default, str):
        return text.strip("'\"")
    if lowered in ("true", "false", "none"):
        literal: object = {"true": True, "false": False, "none": None}[lowered]
    else:
        try:
            literal = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            try:
                literal = float(text)  # inf and nan are no literals
            except ValueError:
                raise UsageError(f"{name} of {what} is {text!r}, which is no value") from None
    if isinstance(default, tuple | list):
        if not isinstance(literal, tuple | list) or len(literal) != len(default):
            raise UsageError(f"{name} of {what} is {text!r}, expected {len(default)} numbers with commas")
        return tuple(float(value) for value in literal)
    # An int as default says little: classes write `weight_decay=0` and mean a float.
    if isinstance(default, int | float) and (
        isinstance(literal, bool) or not isinstance(literal, int | float)
    ):
        raise UsageError(f"{name} of {what} is {text!r}, expected a number")
    return literal
