"""Plain tables on standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from lycotool.cli._text import clean

if TYPE_CHECKING:
    from rich.console import Console

#: Between two columns.
_GAP = "  "


class Table:
    """Headings and lines of text, one cell per column; cells at the end may be left out."""

    def __init__(self, headings: Iterable[str], *, has_header: bool) -> None:
        self.headings = [clean(heading) for heading in headings]
        self.has_header = has_header
        self.rows: list[list[str]] = []

    def lines(self) -> list[str]:
        """The lines with their columns below each other, the headings first."""
        rows = [self.headings, *self.rows] if self.has_header else self.rows
        columns = list(zip_longest(*rows, fillvalue=""))
        padded = [_padded(column) for column in columns]
        return [_GAP.join(cells).rstrip(" ") for cells in zip(*padded, strict=True)]


def _padded(column: Sequence[str]) -> Iterator[str]:
    """The cells of a column, as wide as the widest."""
    if all(map(str.isascii, column)):
        width = max(map(len, column))
        return (cell.ljust(width) for cell in column)
    from rich.cells import cell_len  # some characters take two places, and some none

    widths = [cell_len(cell) for cell in column]
    most = max(widths)
    return (cell + " " * (most - width) for cell, width in zip(column, widths, strict=True))


def table_of(*columns: str, has_header: bool = True) -> Table:
    """A plain table with these headings."""
    return Table(columns, has_header=has_header)


def add_row(table: Table, *cells: object) -> None:
    """Add a line, with text from files made safe to print."""
    table.rows.append([clean(str(cell)) for cell in cells])


def show_tables(tables: Iterable[Table]) -> None:
    """Print tables with an empty line between two.

    Rich lays out what is wider than the terminal, and makes headings bold there. Elsewhere nothing
    is cut, and Rich is not even imported: it takes as long to lay out a thousand lines as to read
    what they are about.
    """
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    console = _console() if is_terminal else None
    for number, table in enumerate(tables):
        if number:
            sys.stdout.write("\n")
        if console is not None:
            _lay_out(table, console)
        elif lines := table.lines():
            sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _console() -> Console:
    from rich.console import Console

    return Console(no_color=bool(os.environ.get("NO_COLOR")), highlight=False, markup=False, emoji=False)


def _lay_out(table: Table, console: Console) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    laid_out = RichTable(box=None, pad_edge=False, header_style="bold", show_header=table.has_header)
    for heading in table.headings:
        laid_out.add_column(heading, overflow="fold")
    for row in table.rows:
        laid_out.add_row(*map(Text, row))
    console.print(laid_out)


def counted(counts: Mapping[str, int]) -> str:
    """``name 3, other 1``."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())
