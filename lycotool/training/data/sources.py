"""What every reader of a data set gives: files with their captions, and the options they get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lycotool.training.data.options import DataOptions


@dataclass(frozen=True, slots=True)
class Entry:
    """An image file that was found, and its caption; None if it has none."""

    path: Path
    caption: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """The images of one folder or metadata file.

    ``group`` is the number of the ``[[datasets]]`` it belongs to.
    """

    place: Path
    options: DataOptions
    entries: tuple[Entry, ...]
    group: int = 0
