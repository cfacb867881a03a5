"""Bars in a terminal: what `--plot` shows where there is nothing to draw with, or for `-`."""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING

from lycotool.cli._tables import Table, add_row, show_tables, table_of

if TYPE_CHECKING:
    from lycotool.ops._inspect_compare import Comparison
    from lycotool.ops._inspect_rows import BlockRow
    from lycotool.ops._inspect_stats import Stats
    from lycotool.ops.inspect import InspectReport

#: Characters of the longest bar, and eighths of one.
_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"

#: Levels at which the decay of the singular values is shown.
_DECAY = 16


def bar(share: float) -> str:
    """A bar of ``share`` of the full width, to an eighth of a character.

    >>> bar(0.5) == "█" * 20
    True
    """
    eighths = round(8 * _WIDTH * min(1.0, max(0.0, share)))
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8].strip() if eighths % 8 else "")


def show_bars(report: InspectReport) -> None:
    """Print the figures of a plot as bars."""
    tables: list[Table] = []
    if report.comparison is not None:
        tables.append(_cosines(report.comparison))
    elif report.stats is not None:
        if report.blocks:
            tables.append(_norms(report.blocks))
        tables.append(_decay(report.stats))
    for table in tables:
        sys.stdout.write("\n")
        show_tables([table])


def _norms(blocks: list[BlockRow]) -> Table:
    table = table_of("block", "‖ΔW‖_F", "", "energy")
    most = max((row.fro or 0.0 for row in blocks), default=0.0) or 1.0
    for row in blocks:
        add_row(table, row.block, f"{row.fro or 0:.4g}", bar((row.fro or 0.0) / most), f"{100 * (row.share or 0):.1f} %")  # fmt: skip
    return table


def _decay(stats: Stats) -> Table:
    """Medians of ``σ_k / σ_1`` over all modules."""
    table = table_of("k", "median σ_k / σ_1", "")
    alive = [m.values for m in stats.modules if m.values and m.values[0] > 0]
    longest = max(map(len, alive), default=0)
    for k in sorted({round(1 + i * (longest - 1) / (_DECAY - 1)) for i in range(_DECAY)} if longest else ()):
        share = statistics.median(values[k - 1] / values[0] if k <= len(values) else 0.0 for values in alive)
        add_row(table, k, f"{share:.3g}", bar(share))
    return table


def _cosines(comparison: Comparison) -> Table:
    """How many layers have which cosine."""
    table = table_of("cosine", "layers", "")
    cosines = [row.cosine for row in comparison.layers if row.cosine is not None]
    counts = [0] * 10
    for cosine in cosines:
        counts[min(9, int((cosine + 1) * 5))] += 1
    most = max(counts, default=0) or 1
    for index, count in enumerate(counts):
        add_row(table, f"{index / 5 - 1:+.1f} to {index / 5 - 0.8:+.1f}", count, bar(count / most))
    return table
