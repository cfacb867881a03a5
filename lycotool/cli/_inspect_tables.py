"""The tables of ``lycotool inspect`` on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lycotool.cli._inspect_measured import comparison_tables, findings_table, stats_tables, tag_tables
from lycotool.cli._output import Output, human_bytes
from lycotool.cli._tables import Table, add_row, counted, show_tables, table_of
from lycotool.cli._text import clean

if TYPE_CHECKING:
    from lycotool.ops._inspect_rows import BlockRow, HashRow, ModuleRow
    from lycotool.ops.inspect import InspectReport


def show(report: InspectReport, out: Output, *, metadata: bool, stats: bool, top: int) -> None:
    """Print what is known of one file."""
    facts = table_of("", "", has_header=False)
    add_row(facts, "file", report.path)
    add_row(facts, "kind", report.kind)
    add_row(
        facts,
        "size",
        f"{human_bytes(report.bytes)}, {report.tensors} tensors, {report.parameters} parameters",
    )
    add_row(facts, "dtypes", counted(report.dtypes))
    add_row(facts, "architecture", f"{report.architecture} ({report.architecture_evidence})")
    if report.dialects:
        add_row(facts, "key names", ", ".join(report.dialects))
    add_row(facts, "components", counted(report.components))
    tables = [facts]
    if report.algorithms:
        tables += [_module_types(report), _dims(report), _verdicts(report), _loaders(report)]
    shown = report.metadata if metadata else report.metadata_summary
    if shown:
        tables.append(_metadata(shown, title="metadata" if metadata else "metadata (summary)"))
    if report.blocks is not None:
        tables.append(_blocks(report.blocks))
    if report.modules is not None:
        tables.append(_modules(report.modules))
    if report.stats is not None and stats:
        tables += stats_tables(report.stats, top)
    if report.comparison is not None:
        tables += comparison_tables(report.comparison, top)
    tables += [_hash_table(row) for row in report.hashes or ()]
    if report.tags is not None:
        tables += tag_tables(report.tags, top)
    if report.findings is not None:
        tables.append(findings_table(report.findings))
    show_tables(tables)
    out.warnings(report.warnings)
    for fault in report.faults:
        sys.stderr.write(clean(f"lycotool: fault: {report.path}: {fault}") + "\n")


def _module_types(report: InspectReport) -> Table:
    names = list(report.components)
    table = table_of("module type table", "modules", *names)
    for row in report.algorithms:
        add_row(table, row.type, row.modules, *(row.components.get(name, 0) for name in names))
    return table


def _dims(report: InspectReport) -> Table:
    table = table_of("type", "layouts", "dim: modules", "alpha: modules", "use_conv_cp", "DoRA")
    for row in report.algorithms:
        add_row(
            table,
            row.type,
            ", ".join(row.layouts),
            _by_value(row.rank),
            _by_value(row.alpha),
            "yes" if row.use_conv_cp else "no",
            f"{row.dora_axis}put axis" if row.dora_axis else "no",
        )
    return table


def _verdicts(report: InspectReport) -> Table:
    table = table_of("type", "merge", "resize", "as LoRA", "why")
    for row in report.algorithms:
        as_lora = "exact" if row.exact_as_lora else "needs the base" if row.needs_base else "by SVD"
        reasons = [row.mergeable_reason, row.resizable_reason, row.remedy, row.advice]
        why = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        add_row(table, row.type, _yes(row.mergeable), _yes(row.resizable), as_lora, why)
    return table


def _loaders(report: InspectReport) -> Table:
    table = table_of("loads in", "version", "modules", "why not all")
    for row in report.loaders:
        total = row.takes + sum(row.reasons.values())
        add_row(table, row.loader, row.version, f"{row.takes} of {total}", "; ".join(row.reasons))
    return table


def _blocks(blocks: Sequence[BlockRow]) -> Table:
    measured = any(row.fro is not None for row in blocks)
    table = table_of(
        "block", "modules", "types", "dim: modules", "parameters", *["‖ΔW‖_F", "energy"] * measured
    )
    for row in blocks:
        strength = [f"{row.fro or 0:.4g}", f"{100 * (row.share or 0):.1f} %"] * measured
        add_row(
            table, row.block, row.modules, counted(row.types), _by_value(row.rank), row.parameters, *strength
        )
    return table


def _hash_table(row: HashRow) -> Table:
    table = table_of("hash", "")
    stored = row.stored or "none"
    if stored.startswith("0x"):
        stored += " (LyCORIS' own, of the tensors in another order)"
    elif row.stored is not None:
        stored += " (stale: not that of the data)" if row.stale else " (right)"
    for name, value in (
        ("sha256", row.sha256), ("AutoV2", row.autov2), ("data sha256", row.data_sha256),
        ("AutoV3", row.autov3), ("sshs_model_hash", stored),
    ):  # fmt: skip
        add_row(table, name, value)
    return table


def _modules(modules: Sequence[ModuleRow]) -> Table:
    table = table_of(
        "module", "type", "layout", "shape", "rank", "alpha", "scale", "parameters", "dtype", "loads in"
    )
    for m in modules:
        rank, alpha = ("-" if value is None else f"{value:g}" for value in (m.rank, m.alpha))
        add_row(table, m.name, m.type, m.layout, m.shape, rank, alpha, f"{m.scale:g}", m.parameters, m.dtype,
                ", ".join(m.loaders))  # fmt: skip
    return table


def _metadata(metadata: Mapping[str, object], title: str) -> Table:
    table = table_of(title, "")
    for key, value in metadata.items():
        add_row(table, key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return table


def _by_value(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value}: {count}" for value, count in counts.items())


def _yes(allowed: bool) -> str:
    return "yes" if allowed else "no"
