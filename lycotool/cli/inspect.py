"""``lycotool inspect``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._output import Output, human_bytes
from lycotool.cli._text import clean
from lycotool.errors import LycotoolError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lycotool.ops.inspect import BlockRow, HashRow, InspectReport

EPILOG = """Examples:

lycotool inspect style.safetensors --modules

lycotool inspect loras/ --json | jq -r '.files[] | [.path, .architecture] | @tsv'"""

#: Columns where there is no terminal to ask: no truncation.
_UNLIMITED = 100_000


@reported
def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, folders, or `-`.")],
    modules: Annotated[bool, typer.Option("--modules", help="Show every module.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Show all metadata, decoded.")] = False,
    blocks: Annotated[bool, typer.Option("--blocks", help="Count modules by block of the model.")] = False,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="SHA-256, AutoV2 and AutoV3; reads the whole file.")
    ] = False,
    allow_pickle: opt.PickleOption = False,
    json_output: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Show what a file is: algorithms, ranks, alphas, names, metadata, and what can be done with it.

    Reads headers only, but for `--hashes`. Several files, or a folder, give one line per file.
    """
    from lycotool.ops.inspect import expand
    from lycotool.ops.inspect import inspect as run

    out = Output(json=json_output, quiet=quiet)
    names = expand(files)
    if not names:
        raise UsageError("no safetensors files in there", path=files[0])
    reports: list[InspectReport] = []
    errors: list[LycotoolError] = []
    for name in names:
        try:
            reports.append(run(name, allow_pickle=allow_pickle, hashes=hashes, blocks=blocks))
        except LycotoolError as error:
            if len(names) == 1:
                raise
            errors.append(error)
    if json_output:
        out.document({"files": [_document(r, modules=modules) for r in reports],
                      "errors": [{"path": e.path, "message": e.message} for e in errors]})  # fmt: skip
    elif len(names) == 1:
        _show(reports[0], out, modules=modules, metadata=metadata)
    else:
        _show_list(reports)
    for failure in errors:
        sys.stderr.write(clean(f"lycotool: error: {failure.headline}") + "\n")
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _document(report: InspectReport, *, modules: bool) -> dict[str, object]:
    document = dataclasses.asdict(report)
    if not modules:
        document["modules"] = len(report.modules)
    return document


def _console() -> Console:
    from rich.console import Console

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return Console(
        width=None if terminal else _UNLIMITED,
        no_color=not terminal or bool(os.environ.get("NO_COLOR")),
        highlight=False,
        markup=False,
        emoji=False,
    )


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    from rich.text import Text

    table.add_row(*(Text(clean(str(cell))) for cell in cells))


def _show(report: InspectReport, out: Output, *, modules: bool, metadata: bool) -> None:
    console = _console()
    facts = _table("", "")
    facts.show_header = False
    _row(facts, "file", report.path)
    _row(facts, "kind", report.kind)
    _row(
        facts,
        "size",
        f"{human_bytes(report.bytes)}, {report.tensors} tensors, {report.parameters} parameters",
    )
    _row(facts, "dtypes", _counted(report.dtypes))
    _row(facts, "architecture", f"{report.architecture} ({report.architecture_evidence})")
    if report.dialects:
        _row(facts, "key names", ", ".join(report.dialects))
    _row(facts, "components", _counted(report.components))
    console.print(facts)
    if report.algorithms:
        console.print()
        console.print(_module_types(report))
        console.print()
        console.print(_dims(report))
        console.print()
        console.print(_verdicts(report))
        console.print()
        console.print(_loaders(report))
    if report.blocks is not None:
        console.print()
        console.print(_blocks(report.blocks))
    if modules:
        console.print()
        console.print(_modules(report))
    for row in report.hashes or ():
        console.print()
        console.print(_hash_table(row))
    shown = report.metadata if metadata else report.metadata_summary
    if shown:
        console.print()
        console.print(_metadata(shown, title="metadata" if metadata else "metadata (summary)"))
    out.warnings(report.warnings)
    for fault in report.faults:
        sys.stderr.write(clean(f"lycotool: fault: {report.path}: {fault}") + "\n")


def _module_types(report: InspectReport) -> Table:
    names = list(report.components)
    table = _table("module type table", "modules", *names)
    for row in report.algorithms:
        _row(table, row.type, row.modules, *(row.components.get(name, 0) for name in names))
    return table


def _dims(report: InspectReport) -> Table:
    table = _table("type", "layouts", "dim: modules", "alpha: modules", "use_conv_cp", "DoRA")
    for row in report.algorithms:
        _row(
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
    table = _table("type", "merge", "resize", "as LoRA", "why")
    for row in report.algorithms:
        as_lora = "exact" if row.exact_as_lora else "needs the base" if row.needs_base else "by SVD"
        reasons = [row.mergeable_reason, row.resizable_reason, row.remedy, row.advice]
        why = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        _row(table, row.type, _yes(row.mergeable), _yes(row.resizable), as_lora, why)
    return table


def _loaders(report: InspectReport) -> Table:
    table = _table("loads in", "version", "modules", "why not all")
    for row in report.loaders:
        total = row.takes + sum(row.reasons.values())
        _row(table, row.loader, row.version, f"{row.takes} of {total}", "; ".join(row.reasons))
    return table


def _blocks(blocks: list[BlockRow]) -> Table:
    table = _table("block", "modules", "types", "dim: modules", "parameters")
    for row in blocks:
        _row(table, row.block, row.modules, _counted(row.types), _by_value(row.rank), row.parameters)
    return table


def _hash_table(row: HashRow) -> Table:
    table = _table("hash", "")
    stored = row.stored or "none"
    if stored.startswith("0x"):
        stored += " (LyCORIS' own, of the tensors in another order)"
    elif row.stored is not None:
        stored += " (stale: not that of the data)" if row.stale else " (right)"
    for name, value in (
        ("sha256", row.sha256), ("AutoV2", row.autov2), ("data sha256", row.data_sha256),
        ("AutoV3", row.autov3), ("sshs_model_hash", stored),
    ):  # fmt: skip
        _row(table, name, value)
    return table


def _modules(report: InspectReport) -> Table:
    table = _table(
        "module", "type", "layout", "shape", "rank", "alpha", "scale", "parameters", "dtype", "loads in"
    )
    for m in report.modules:
        rank, alpha = ("-" if value is None else f"{value:g}" for value in (m.rank, m.alpha))
        _row(table, m.name, m.type, m.layout, m.shape, rank, alpha, f"{m.scale:g}", m.parameters, m.dtype,
             ", ".join(m.loaders))  # fmt: skip
    return table


def _metadata(metadata: Mapping[str, object], title: str) -> Table:
    table = _table(title, "")
    for key, value in metadata.items():
        _row(table, key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return table


def _show_list(reports: list[InspectReport]) -> None:
    table = _table("file", "kind", "architecture", "types", "dims", "size")
    for report in reports:
        ranks = dict.fromkeys(rank for row in report.algorithms for rank in row.rank)
        types = _counted({row.type: row.modules for row in report.algorithms})
        faults = f" ({len(report.faults)} faults)" if report.faults else ""
        _row(table, report.path, report.kind + faults, report.architecture, types, ", ".join(ranks),
             human_bytes(report.bytes))  # fmt: skip
    _console().print(table)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _by_value(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value}: {count}" for value, count in counts.items())


def _yes(allowed: bool) -> str:
    return "yes" if allowed else "no"
