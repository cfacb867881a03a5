"""Tables of what `inspect` reads tensors and captions for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from lycotool.cli._tables import Table, add_row, table_of

if TYPE_CHECKING:
    from lycotool.ops._findings import Finding
    from lycotool.ops._inspect_compare import Comparison, PairRow
    from lycotool.ops._inspect_stats import ModuleStats, Stats, StatsTotals
    from lycotool.ops._inspect_tags import TagRow

Row = TypeVar("Row")

#: Names shown in a line before "and N more".
_NAMES = 3


def stats_tables(stats: Stats, top: int) -> list[Table]:
    """Totals by component, and the strongest modules."""
    has_base = stats.totals.relative is not None
    relative = ["‖ΔW‖/‖W‖"] * has_base
    totals = table_of("strength", "modules", "‖ΔW‖_F", "‖ΔW‖₂", *relative, "stable rank", "effective rank",
                      "rank", "99 % rank", "dead", "non-finite")  # fmt: skip
    everything: Mapping[str, StatsTotals] = {**stats.components, "all": stats.totals}
    for name, row in everything.items():
        counted_of = str(row.modules) if row.measured == row.modules else f"{row.measured} of {row.modules}"
        add_row(totals, name, counted_of, _number(row.fro), _number(row.spectral), *[_number(row.relative)] * has_base,
                _number(row.mean_stable_rank), _number(row.mean_effective_rank), row.rank, row.energy_rank_99,
                row.dead, row.non_finite)  # fmt: skip
    modules = table_of("strongest modules", "type", "‖ΔW‖_F", "‖ΔW‖₂", *relative, "stable rank", "effective rank",
                       "90/95/99 % rank", "of", "largest value")  # fmt: skip
    shown = sorted((m for m in stats.modules if m.fro is not None), key=lambda m: -(m.fro or 0.0))
    for m in _first(shown, top):
        add_row(modules, m.name, m.type, _number(m.fro), _number(m.spectral), *[_number(m.relative)] * has_base,
                _number(m.stable_rank), _number(m.effective_rank),
                f"{m.energy_rank_90}/{m.energy_rank_95}/{m.energy_rank_99}", m.rank, _number(m.largest))  # fmt: skip
    _rest(modules, shown, top)
    return [totals, modules, *_gaps(stats.modules)]


def _gaps(modules: Sequence[ModuleStats]) -> list[Table]:
    """What is dead, not finite or not measured."""
    groups: dict[str, list[str]] = {}
    for m in modules:
        if m.is_dead:
            groups.setdefault("dead", []).append(m.name)
        elif m.reason:
            groups.setdefault(m.reason if m.is_finite else "not finite", []).append(m.name)
    if not groups:
        return []
    table = table_of("not measured, or zero", "modules", "")
    for reason, names in groups.items():
        hint = " (`--base CHECKPOINT` gives it)" if reason == "depends on the base weight" else ""
        add_row(table, reason + hint, len(names), _names(names))
    return [table]


def comparison_tables(comparison: Comparison, top: int) -> list[Table]:
    """Totals, and the layers that are least alike."""
    c = comparison
    totals = table_of(f"{c.path} against", c.other)
    for name, value in (
        ("layers compared", str(c.compared)),
        ("cosine", _number(c.cosine)),
        ("norm ratio (second / first)", _number(c.norm_ratio)),
        ("overlap of outputs", _number(c.overlap_out)),
        ("overlap of inputs", _number(c.overlap_in)),
        ("interference of the sum", _number(c.interference)),
        ("opposite signs (sampled)", _percent(c.sign_conflict)),
        ("only in the first", _count_names(c.only_first)),
        ("only in the second", _count_names(c.only_second)),
        *(((f"not compared: {reason}"), str(number)) for reason, number in c.not_compared.items()),
    ):
        add_row(totals, name, value)
    layers = table_of("least alike", "types", "cosine", "norm ratio", "overlap out", "overlap in", "interference",
                      "opposite signs")  # fmt: skip
    shown = sorted((row for row in c.layers if row.cosine is not None), key=lambda row: row.cosine or 0.0)
    for row in _first(shown, top):
        add_row(layers, row.name, _types(row), _number(row.cosine), _number(row.norm_ratio), _number(row.overlap_out),
                _number(row.overlap_in), _number(row.interference), _percent(row.sign_conflict))  # fmt: skip
    _rest(layers, shown, top)
    return [totals, layers]


def _types(row: PairRow) -> str:
    return row.type if row.type == row.other_type else f"{row.type}, {row.other_type}"


def tag_tables(tags: Sequence[TagRow], top: int) -> list[Table]:
    """The commonest tags."""
    table = table_of("tag", "count", "data sets", "of the images")
    for row in _first(tags, top):
        add_row(table, row.tag, row.count, row.datasets, _percent(row.share))
    _rest(table, tags, top)
    if not tags:
        add_row(table, "no tags in the metadata (ss_tag_frequency)")
    return [table]


def findings_table(findings: Sequence[Finding]) -> Table:
    """What a check found, worst first."""
    table = table_of("check", "", "found", "where", "what to do")
    for finding in findings:
        add_row(table, finding.severity, finding.id, finding.text, _names(finding.modules), finding.remedy)
    if not findings:
        add_row(table, "passed", "", "nothing found")
    return table


def _first(rows: Sequence[Row], top: int) -> Sequence[Row]:
    return rows[:top] if top else rows


def _rest(table: Table, rows: Sequence[object], top: int) -> None:
    if top and len(rows) > top:
        add_row(table, f"… and {len(rows) - top} more (`--top 0` shows all)")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def _count_names(names: Sequence[str]) -> str:
    return f"{len(names)}: {_names(names)}" if names else "0"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
