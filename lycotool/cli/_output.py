"""What a command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from lycotool.cli._text import clean

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

#: What a level of a ``--json`` document stands to the right, and what closes a list at the first.
_INDENT = "  "
_NEXT = "\n" + _INDENT

#: Raised when a key of a ``--json`` document is renamed or removed.
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """The two streams, as the options want them."""

    json: bool = False
    quiet: bool = False

    def result(self, line: str) -> None:
        """Print a result on stdout."""
        sys.stdout.write(clean(line) + "\n")
        sys.stdout.flush()

    def document(self, document: Mapping[str, object]) -> None:
        """Print the ``--json`` object on stdout."""
        sys.stdout.write(json_text({"schema_version": SCHEMA_VERSION, **document}) + "\n")
        sys.stdout.flush()

    def listing(self, files: Sequence[str], errors: Sequence[Mapping[str, object]]) -> None:
        """Print the ``--json`` object of several files, each of which is :func:`json_text` already."""
        whole = json_text({"schema_version": SCHEMA_VERSION, "files": [], "errors": errors})
        inside = [file.replace("\n", "\n" + 2 * _INDENT) for file in files]
        start, rest = whole.split("[]", 1)  # that of the files, which stand first
        lines = [f"\n{2 * _INDENT}{file}" for file in inside]
        sys.stdout.write(f"{start}[{','.join(lines)}{_NEXT if lines else ''}]{rest}\n")
        sys.stdout.flush()

    def note(self, line: str) -> None:
        """Report something on stderr, unless quiet."""
        if not self.quiet:
            sys.stderr.write(clean(line) + "\n")

    def warnings(self, lines: Iterable[str]) -> None:
        """Print warnings on stderr, unless quiet."""
        for line in lines:
            self.note(f"lycotool: warning: {line}")

    def progress(self) -> ProgressBar:
        """A bar on a terminal, nothing elsewhere."""
        return ProgressBar(shown=not self.quiet and not self.json and _is_terminal())


def json_text(document: object) -> str:
    """JSON as ``--json`` prints it."""
    return json.dumps(document, indent=_INDENT, default=_plain)


def _is_terminal() -> bool:
    import os

    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(type(value).__name__)


class ProgressBar:
    """A Rich progress bar that a command drives through `start` and `advance`."""

    def __init__(self, *, shown: bool) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, label: str, total: int) -> None:
        """A phase of ``total`` bytes begins."""
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total)

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, nbytes)


def human_bytes(count: float) -> str:
    """A size in the unit people read.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
