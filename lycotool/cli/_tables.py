"""Plain tables on standard output."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, cast

from lycotool.cli._text import clean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Columns where there is no terminal to ask: no truncation.
_UNLIMITED = 100_000


def console() -> Console:
    """Standard output, without colour and truncation where it is no terminal."""
    from rich.console import Console

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return Console(
        file=None if terminal else cast(IO[str], _Trimmed(sys.stdout)),
        width=None if terminal else _UNLIMITED,
        no_color=not terminal or bool(os.environ.get("NO_COLOR")),
        highlight=False,
        markup=False,
        emoji=False,
    )


class _Trimmed:
    """A stream whose lines do not end in spaces, which tables fill their last column with."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(re.sub(r" +(?=\n|$)", "", text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def table_of(*columns: str) -> Table:
    """A plain table with these headings."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a line, with text from files made safe to print."""
    from rich.text import Text

    table.add_row(*(Text(clean(str(cell))) for cell in cells))


def counted(counts: Mapping[str, int]) -> str:
    """``name 3, other 1``."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())
