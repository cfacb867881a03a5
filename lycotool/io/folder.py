"""Write a small folder: one safetensors file and a text file beside it, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lycotool.errors import OutputError
from lycotool.io.preflight import how_to_make, reason_of
from lycotool.io.tree import flush_files, replace_folder
from lycotool.io.writer import FilePlan, Producer, write_file


def prepare_folder(output: str, inputs: list[Path], *, force: bool) -> Path:
    """Check that a folder can be made, before any work is done.

    Raises
    ------
    OutputError
        If it exists (without ``force``), holds an input, or cannot be made.
    """
    if output == "-":
        raise OutputError("a folder cannot be written to standard output", path=output)
    target = Path(os.path.realpath(output))
    if any(Path(os.path.realpath(source)).is_relative_to(target) for source in inputs):
        raise OutputError("holds the input", path=output, hint="choose another name with `-o`")
    if target.exists():
        if not target.is_dir():
            raise OutputError("is not a folder, and this format is one", path=output)
        if not force:
            raise OutputError("exists already", path=output, hint="use `--force` to replace it")
    if not target.parent.is_dir():
        raise OutputError(
            f"the folder {target.parent} does not exist", path=output, hint=how_to_make(target.parent)
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in the folder {target.parent}", path=output)
    return target


def build_folder(
    building: Path, weights: str, plan: FilePlan, produce: Producer, text: dict[str, str]
) -> None:
    """Write the files of a folder under a temporary name.

    Raises
    ------
    OutputError
        If a write fails; the folder is then gone.
    """
    try:
        building.mkdir()
        write_file(building / weights, plan, produce, flushed=False)
        for name, content in text.items():
            (building / name).write_text(content, encoding="utf-8")
        flush_files(building)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise OutputError(reason_of(error), path=building) from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def publish(building: Path, target: Path) -> None:
    """Give a finished folder its name, replacing what had it.

    Raises
    ------
    OutputError
        If that fails. The target is then as it was, unless the message says that it was written.
    """
    try:
        replace_folder(building, target)
    except OSError as error:
        raise OutputError(reason_of(error), path=target) from error
