"""Adapters as people name them: ``FILE:0.7:te=0.5:lbw=MIDD``."""

from __future__ import annotations

import math

from lycotool.errors import UsageError
from lycotool.io.open import exists
from lycotool.ops._adapter import AdapterInput
from lycotool.ops._methods import OWN_OPTIONS

_FACTORS = ("te", "unet")


def parse_input(text: str, *, methods: bool = False) -> AdapterInput:
    """Split ``FILE:0.7`` at the last colon whose tail is a number, and ``:te=0.5`` and so on.

    A file that really has such a name is taken as it is.

    Parameters
    ----------
    methods
        Whether values for a merge method (``:density=0.5``) may stand there too.

    Raises
    ------
    UsageError
        If a number is none, or not finite.
    """
    own: dict[str, str] = {}
    path = text
    while not exists(path):
        head, colon, tail = path.rpartition(":")
        name, equals, value = tail.partition("=")
        if not colon or not head or not equals or name not in (*_FACTORS, "lbw", *OWN_OPTIONS):
            break
        own.setdefault(name, value)
        path = head
    if path != "-":
        _check_parts(path)
    head, colon, tail = path.rpartition(":")
    strength = 1.0
    if colon and head and not exists(path):
        try:
            strength = float(tail)
        except ValueError:
            head = path
        if not math.isfinite(strength):
            raise UsageError(f"the strength {tail} is not finite", path=head)
        path = head
    if not methods and (given := [name for name in OWN_OPTIONS if name in own]):
        raise UsageError(f"{given[0]} is for `lycotool merge` and its methods", path=path)
    numbers = {
        name: _number(own[name], name, path) if name in own else None for name in (*_FACTORS, *OWN_OPTIONS)
    }
    return AdapterInput(path, strength, lbw=own.get("lbw"), **numbers)


def _check_parts(text: str) -> None:
    """Refuse what follows a file that is there, or stands alone, and is no strength.

    Raises
    ------
    UsageError
        Saying what it could be.
    """
    if exists(text):
        return
    pieces = text.split(":")
    starts = [":".join(pieces[:count]) for count in range(1, len(pieces))]
    file = next((start for start in reversed(starts) if start == "-" or exists(start)), None)
    if file is None:
        if _is_number(text):
            raise UsageError(f"{text} is no file", hint=f"a strength stands with its file: FILE:{text}")
        return
    import difflib

    for piece in text[len(file) + 1 :].split(":"):
        name, equals, _ = piece.partition("=")
        if equals:
            near = difflib.get_close_matches(name, (*_FACTORS, "lbw", *OWN_OPTIONS), 1, 0.5)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"one of {', '.join((*_FACTORS, 'lbw', *OWN_OPTIONS))}"
            )
            if name not in (*_FACTORS, "lbw", *OWN_OPTIONS):
                raise UsageError(f"{name}= is nothing an adapter has", path=file, hint=hint)
        elif not _is_number(piece):
            point = piece.replace(",", ".")
            raise UsageError(
                f"{piece!r} is no strength",
                path=file,
                hint=f"did you mean {file}:{point}?"
                if _is_number(point)
                else f"a number, such as {file}:0.7",
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, name: str, path: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name}={text} is no number", path=path) from None
