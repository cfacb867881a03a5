"""What is wrong with a data set, collected so that one error names everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lycotool.errors import BadInputError, LycotoolError, listed

#: Names shown in a warning; the rest are counted.
_SHOWN = 3


@dataclass
class Findings:
    """Faults by kind, and warnings.

    A kind is worded for one and for many: ``("broken image", "broken images")``.
    """

    faults: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def fault(self, kind: tuple[str, str], path: Path, reason: str = "", *, hint: str | None = None) -> None:
        """Something that stops the run, once everything has been looked at."""
        self.faults.setdefault(kind, []).append(f"{path}: {reason}" if reason else str(path))
        if hint is not None and hint not in self.hints:
            self.hints.append(hint)

    def broken(self, error: LycotoolError) -> None:
        """A file that could not be read."""
        self.fault(("broken image", "broken images"), Path(error.path or "?"), error.message)

    def warn(self, kind: tuple[str, str], names: Sequence[str], end: str = "") -> None:
        """Count and name what the user should know; nothing if there are no names."""
        if not names:
            return
        shown = ", ".join(names[:_SHOWN]) + (
            f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        )
        self.warnings.append(f"{len(names)} {kind[len(names) != 1]}{end}: {shown}")

    def raise_faults(self, source: str) -> None:
        """Raise what was found, if anything was.

        Raises
        ------
        BadInputError
            With the number of every kind and the names.
        """
        if not self.faults:
            return
        counts = ", ".join(f"{len(found)} {kind[len(found) != 1]}" for kind, found in self.faults.items())
        details = [
            line
            for (one, _), found in self.faults.items()
            for line in listed([f"{one}: {fault}" for fault in found])
        ]
        raise BadInputError(counts, path=source, details=details, hint="; ".join(self.hints) or None)
