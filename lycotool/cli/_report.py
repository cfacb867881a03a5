"""What the writing commands say when they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lycotool.cli._output import Output, human_bytes

if TYPE_CHECKING:
    from lycotool.ops._common import AdapterReport
    from lycotool.ops._merge_adapters import AdapterMergeResult
    from lycotool.ops.bake import BakeResult
    from lycotool.ops.replay import ReplayResult


def show_bake(out: Output, result: BakeResult) -> None:
    """Report a checkpoint that was written."""
    _note_bake(out, result)
    finish(out, dataclasses.asdict(result), [result.output], dry_run=result.dry_run)


def _note_bake(out: Output, result: BakeResult) -> None:
    out.warnings(result.warnings)
    for adapter in result.adapters:
        out.note(_adapter_line(adapter))
    out.note(
        f"{_verb(result.dry_run)} {human_bytes(result.nbytes)}: {result.changed} of {result.tensors} tensors "
        f"changed; needs about {human_bytes(result.peak_bytes)} beside the files"
    )
    if result.files > 1:
        out.note(f"in {result.files} files of weights")
    if result.rounding is not None:
        lost = result.rounding
        out.note(
            f"float8 rounding: at most {lost.max_error:.2g}, {lost.mean_error:.2g} on average; "
            f"{lost.saturated} values saturated"
        )
    if result.verified is not None:
        found = result.verified
        out.note(
            f"verified: {found.copied} tensors copied, {found.changed} changed or cast within "
            f"{found.max_error:.2g} of float64, {found.mean_error:.2g} on average"
        )
    if result.reconstruction_error is not None:
        out.note(
            f"every weight is within {result.reconstruction_error:.2g} of what it was before it was baked"
        )


def show_merge(out: Output, result: BakeResult | AdapterMergeResult) -> None:
    """Report what `merge` wrote, a checkpoint or an adapter."""
    _note_merge(out, result)
    finish(out, dataclasses.asdict(result), [result.output], dry_run=result.dry_run)


def show_replay(out: Output, again: ReplayResult, merged: str) -> None:
    """Report a merge that was run again."""
    out.warnings(again.warnings)
    result = again.result
    _note_merge(out, result)
    if again.same_bytes is not None:
        out.note(f"{'the same' if again.same_bytes else 'other'} bytes as {merged}")
    document = {**dataclasses.asdict(result), "same_bytes": again.same_bytes}
    finish(out, document, [result.output], dry_run=result.dry_run)


def _note_merge(out: Output, result: BakeResult | AdapterMergeResult) -> None:
    from lycotool.ops.bake import BakeResult

    if isinstance(result, BakeResult):
        _note_bake(out, result)
    else:
        _note_adapter_merge(out, result)


def _note_adapter_merge(out: Output, result: AdapterMergeResult) -> None:
    out.warnings(result.warnings)
    for adapter in result.adapters:
        out.note(_adapter_line(adapter))
    out.note(
        f"{_verb(result.dry_run)} {human_bytes(result.nbytes)}: {result.modules} modules "
        f"({_counted(result.algorithms)}), method {result.method}"
    )
    if result.relative_error is not None:
        out.note(f"truncation leaves out {result.relative_error:.3%} of the change")
    if result.verified is not None:
        found = result.verified
        out.note(
            f"verified: {found.modules} modules, off by at most {found.max_error:.2g} of their change, "
            f"{found.mean_error:.2g} on average"
        )


def finish(out: Output, document: Mapping[str, object], outputs: Sequence[str], *, dry_run: bool) -> None:
    """The paths on stdout, or the document; a file on standard output stays alone there."""
    if "-" in outputs and not dry_run:
        return
    if out.json:
        out.document(document)
    elif not dry_run:
        for path in outputs:
            out.result(path)


def _adapter_line(adapter: AdapterReport) -> str:
    return (
        f"{adapter.path}: strength {adapter.strength:g}, {adapter.matched} of {adapter.modules} modules "
        f"({_counted(adapter.algorithms)})"
        + (f", {adapter.recut} cut as the checkpoint's layers are" if adapter.recut else "")
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _verb(dry_run: bool) -> str:
    return "would write" if dry_run else "wrote"
