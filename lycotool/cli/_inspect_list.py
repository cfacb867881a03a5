"""Several files in one table, one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lycotool.cli._output import human_bytes
from lycotool.cli._tables import add_row, counted, show_tables, table_of

if TYPE_CHECKING:
    from lycotool.errors import LycotoolError
    from lycotool.ops._inspect_overview import Overview

#: What `--sort` compares; files that are equal in it stay in the order of their names.
KEYS: Mapping[str, Callable[[Overview], Any]] = {
    "name": lambda row: row.path,
    "size": lambda row: row.bytes,
    "rank": lambda row: row.largest_rank,
    "modules": lambda row: row.modules,
    "algorithm": lambda row: list(row.types),
    "arch": lambda row: row.architecture,
    "strength": lambda row: row.strength or 0.0,
    "findings": lambda row: (row.severity, sum((row.findings or {}).values())),
}


def order_of(rows: Sequence[Overview], key: str | None, *, reverse: bool) -> list[int]:
    """The numbers of the rows in the order asked for; without a key only turned round."""
    numbers = list(range(len(rows)))
    if key is not None:
        numbers.sort(key=lambda number: rows[number].path)
        numbers.sort(key=lambda number: KEYS[key](rows[number]), reverse=reverse)
    elif reverse:
        numbers.reverse()
    return numbers


def show_list(rows: Sequence[Overview], errors: Sequence[LycotoolError]) -> None:
    """Print a line for each file, and one for each that could not be read."""
    measured = any(row.strength is not None for row in rows)
    checked = any(row.findings is not None for row in rows)
    extra = ["strength"] * measured + ["findings"] * checked
    table = table_of("file", "kind", "architecture", "types", "dims", "size", *extra)
    for row in rows:
        faults = f" ({row.faults} faults)" if row.faults else ""
        cells = [row.path, row.kind + faults, row.architecture, counted(row.types), ", ".join(row.ranks),
                 human_bytes(row.bytes)]  # fmt: skip
        if measured:
            cells.append("-" if row.strength is None else f"{row.strength:.4g}")
        if checked:
            cells.append(counted(row.findings or {}) or "none")
        add_row(table, *cells)
    for (
        error
    ) in errors:  # what is wrong stands on standard error; it would make a column as wide as a sentence
        add_row(table, error.path or "?", "unreadable")
    show_tables([table])
