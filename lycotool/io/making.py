"""A folder for outputs that is made when they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lycotool.errors import OutputError
from lycotool.io.nameless import fsync_folder, uninterrupted
from lycotool.io.preflight import reason_of


def check_folder(folder: Path) -> None:
    """Check that files can be written into a folder, or that it can be made.

    Raises
    ------
    OutputError
        With what stands in the way.
    """
    place = _absent(folder)[-1].parent if _absent(folder) else folder
    if not place.is_dir():
        raise OutputError("is not a folder", path=place)
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in the folder {place}", path=folder)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents where there are none; take them away again if the body fails.

    Raises
    ------
    OutputError
        If one cannot be made.
    """
    made: list[Path] = []
    try:
        for place in reversed(_absent(folder)):
            _make(place, made)
        yield
    except BaseException:
        for place in reversed(made):
            with contextlib.suppress(OSError):  # another process may have written into it
                place.rmdir()
        raise


def _make(place: Path, made: list[Path]) -> None:
    try:
        with uninterrupted(), contextlib.suppress(FileExistsError):  # of a run at the same moment
            place.mkdir()
            made.append(place)
        fsync_folder(place.parent)
    except OSError as error:
        raise OutputError(reason_of(error), path=place) from error


def _absent(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the lowest first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    return missing
