"""Write a file of any kind, which appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lycotool.errors import OutputError
from lycotool.io.nameless import nameless_file
from lycotool.io.preflight import check_space, reason_of


@contextlib.contextmanager
def whole_file(
    target: Path, nbytes: int, *, check: Callable[[BinaryIO], None] = lambda written: None
) -> Iterator[BinaryIO]:
    """A file to write to, at its beginning.

    When the body is left without an exception the file is flushed to disk, checked, and takes the
    place of whatever had the target's name.

    Parameters
    ----------
    nbytes
        How much space it needs.
    check
        Looks at the finished file before it gets its name; may move in it.

    Raises
    ------
    OutputError
        If the disk is full or any write fails. The target is then as it was before.
    """
    check_space(target, nbytes)
    try:
        with nameless_file(target) as file:
            with os.fdopen(os.dup(file.descriptor), "w+b") as written:
                yield written
                written.flush()
                os.fsync(written.fileno())
                check(written)
            file.publish()
    except OSError as error:
        raise OutputError(reason_of(error), path=target) from error
