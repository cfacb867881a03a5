"""Editing metadata from the command line; see :mod:`lycotool.ops._inspect_edit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from lycotool.cli._output import Output
from lycotool.cli._text import clean
from lycotool.errors import LycotoolError, UsageError

if TYPE_CHECKING:
    from lycotool.ops._inspect_edit import EditOptions, EditResult


def edit_options(
    set_: list[str] | None,
    unset: list[str] | None,
    strip_training_data: bool,
    output: str | None,
    in_place: bool,
    force: bool,
    dry_run: bool,
) -> EditOptions:
    """The editing options as one value.

    Raises
    ------
    UsageError
        If a `--set` has no `=`, or sets a key again.
    """
    from lycotool.ops._inspect_edit import EditOptions

    values: dict[str, str] = {}
    for text in set_ or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"`--set {text}` has no `=`, expected KEY=VALUE")
        if key in values:
            raise UsageError(f"{key} is set twice")
        values[key] = value
    return EditOptions(
        set=values,
        unset=tuple(unset or ()),
        strip_training_data=strip_training_data,
        output=output,
        in_place=in_place,
        force=force,
        dry_run=dry_run,
    )


def edit(names: Sequence[str], options: EditOptions, out: Output) -> None:
    """Edit each file; one that fails does not keep the others from being edited."""
    from lycotool.ops._inspect_edit import edit_metadata

    if len(names) > 1 and options.output is not None:
        raise UsageError(f"-o names one file, these are {len(names)}", hint="`--in-place` edits each")
    errors: list[LycotoolError] = []
    results: list[EditResult] = []
    for name in names:
        try:
            result = edit_metadata(name, options)
        except LycotoolError as error:
            if len(names) == 1:
                raise
            errors.append(error)
            continue
        results.append(result)
        for sign, keys in (("+", result.added), ("~", result.changed), ("-", result.removed)):
            for key in keys:
                out.note(f"{sign} {key}")
        if not (result.added or result.changed or result.removed):
            out.note(f"{name}: nothing to change")
        if not out.json and not options.dry_run:
            out.result(result.output)
    if out.json:
        out.document({"files": results, "errors": faults(errors)})
    end_with(errors)


def faults(errors: Sequence[LycotoolError]) -> list[dict[str, object]]:
    """Errors of single files as `--json` has them."""
    return [{"path": e.path, "key": e.key, "message": e.message, "exit_code": e.exit_code} for e in errors]


def end_with(errors: Sequence[LycotoolError]) -> None:
    """Say what failed, and end with the first one's exit code."""
    for error in errors:
        sys.stderr.write(clean(f"lycotool: error: {error.headline}") + "\n")
    if errors:
        raise typer.Exit(errors[0].exit_code)
