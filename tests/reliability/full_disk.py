"""A disk that is full, or nearly: a small tmpfs or ext4, filled up but for some pages.

An ext4 lies in an image that a loop device shows as a disk, and is a new one for every run. Where the system lets nobody mount one, the error that a full disk gives is injected at every
call that writes instead.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reliability.injection import Job, Struck, strike_errors
from reliability.lab import OK, OUTPUT, Server, Setting, Snapshot, watched

PAGE = os.sysconf("SC_PAGE_SIZE")

#: KiB that an ext4 needs for its journal and tables.
_EXT4_OWN = 8192

_FULL = re.compile(rb"need \d+ bytes, \d+ are free|no space left on device")


@dataclass
class Outcome:
    """What a disk with less and less room led to.

    Attributes
    ----------
    how
        ``tmpfs``, ``ext4`` or ``injected``.
    codes
        By the number of pages that were free, or of the call that failed.
    """

    how: str
    codes: dict[int, int] = field(default_factory=dict)


def run_on_full_disk(
    server: Server,
    job: Job,
    folder: Path,
    pages: Sequence[int],
    *,
    prepare: Callable[[Path], None] | None = None,
    kilobytes: int = 1024,
    copies: int = 1,
    kind: Literal["tmpfs", "ext4"] = "tmpfs",
) -> Outcome:
    """Run a job where so many pages are free beside its inputs and old outputs.

    Parameters
    ----------
    prepare
        Makes the job's files instead of the job itself.

    Raises
    ------
    AssertionError
        If anything but the whole output, or the old one and an error that says why, is there.
    """
    prepare = prepare or job.arrange
    disk = folder / "disk"
    disk.mkdir(parents=True)
    outcome = Outcome(kind)
    image = folder / "image" if kind == "ext4" else None
    for free in pages:
        seen = server.mounted(disk, kilobytes + _EXT4_OWN if image else kilobytes, image=image)
        if seen is None:
            return _injected(server, job, folder)
        try:
            prepare(seen)
            _fill(seen / "filler", free)
            before = watched(seen)
            ended = server.run(disk, job.argv, Setting(copies=copies))
            told = f"{job.name} with {free} free pages: {ended.text}"
            assert set(ended.codes) <= {OK, OUTPUT}, told
            if OK in ended.codes:
                assert not [name for name in Snapshot.of(seen).entries if ".lycotool-" in name], told
            else:
                before.check(ended)  # D0, and what is always so
            if OUTPUT in ended.codes:
                assert _FULL.search(ended.stderr), told
            outcome.codes[free] = max(ended.codes)
        finally:
            server.unmount(disk)
    return outcome


def _fill(filler: Path, free: int) -> None:
    """Take all room but some pages."""
    room = os.statvfs(filler.parent)
    length = room.f_bavail * room.f_frsize - free * PAGE
    with filler.open("wb") as file:
        if length > 0:
            os.posix_fallocate(file.fileno(), 0, length)


def _injected(server: Server, job: Job, folder: Path) -> Outcome:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        struck = Struck(server, job, Path(place))
        points = struck.points(reading=False)
        ended = list(strike_errors(struck, [(nth, errno.ENOSPC) for nth in points]))
    return Outcome("injected", {nth: one.code for nth, one in zip(points, ended, strict=True)})
