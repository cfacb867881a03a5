"""Sizes of files as people write them."""

from __future__ import annotations

import re

from lycotool.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """``32MB`` (decimal) or ``32MiB`` (binary) as bytes.

    >>> parse_size("1.5KiB")
    1536

    Raises
    ------
    UsageError
        If it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"{text} is no size", hint="such as 32MB, 30MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])
