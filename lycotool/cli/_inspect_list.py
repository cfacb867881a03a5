"""Several files in one table, one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lycotool.cli._output import human_bytes
from lycotool.cli._tables import add_row, console, counted, table_of

if TYPE_CHECKING:
    from lycotool.errors import LycotoolError
    from lycotool.ops.inspect import InspectReport


def _ranks(report: InspectReport) -> list[int]:
    return sorted({int(rank) for row in report.algorithms for rank in row.rank if rank.isdigit()})


def _severity(report: InspectReport) -> tuple[int, int]:
    from lycotool.ops._inspect_checks import SEVERITIES, worst

    found = worst(report.findings or ())
    return (-1 if found is None else SEVERITIES.index(found), len(report.findings or ()))


#: What `--sort` compares; files that are equal in it stay in the order of their names.
_KEYS: Mapping[str, Callable[[InspectReport], Any]] = {
    "name": lambda report: report.path,
    "size": lambda report: report.bytes,
    "rank": lambda report: max(_ranks(report), default=0),
    "modules": lambda report: report.module_count,
    "algorithm": lambda report: [row.type for row in report.algorithms],
    "arch": lambda report: report.architecture,
    "strength": lambda report: report.stats.totals.fro if report.stats else 0.0,
    "findings": _severity,
}


def ordered(reports: Sequence[InspectReport], key: str | None, *, reverse: bool) -> list[InspectReport]:
    """The reports in another order; without a key only turned round."""
    if key is None:
        return list(reversed(reports))
    by_name = sorted(reports, key=_KEYS["name"])
    return sorted(by_name, key=_KEYS[key], reverse=reverse)


def show_list(reports: Sequence[InspectReport], errors: Sequence[LycotoolError]) -> None:
    """Print a line for each file, and one for each that could not be read."""
    measured = any(report.stats for report in reports)
    checked = any(report.findings is not None for report in reports)
    extra = ["strength"] * measured + ["findings"] * checked
    table = table_of("file", "kind", "architecture", "types", "dims", "size", *extra)
    for report in reports:
        types = counted({row.type: row.modules for row in report.algorithms})
        faults = f" ({len(report.faults)} faults)" if report.faults else ""
        ranks = ", ".join(dict.fromkeys(rank for row in report.algorithms for rank in row.rank))
        cells = [
            report.path,
            report.kind + faults,
            report.architecture,
            types,
            ranks,
            human_bytes(report.bytes),
        ]
        if measured:
            cells.append(f"{report.stats.totals.fro:.4g}" if report.stats else "-")
        if checked:
            counts: Counter[str] = Counter(finding.severity for finding in report.findings or ())
            cells.append(counted(counts) or "none")
        add_row(table, *cells)
    for error in errors:
        add_row(table, error.path or "?", "unreadable", error.message)
    console().print(table)
