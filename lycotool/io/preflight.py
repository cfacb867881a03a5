"""What is checked before anything is written: that the output can be."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from lycotool.errors import OutputError


def how_to_make(folder: Path) -> str:
    """A hint for a folder that is missing."""
    import shlex

    return f"`mkdir -p {shlex.quote(str(folder))}` makes it; `-o` names another place"


def prepare_output(path: str, *, inputs: Iterable[Path], force: bool) -> Path | None:
    """Check that ``path`` can be written, before any work is done.

    Returns
    -------
    Path or None
        The resolved target (so that a symlink stays a link); ``None`` for standard output.

    Raises
    ------
    OutputError
        With what stands in the way: exists, is an input, no folder, no permission, not a
        regular file.
    """
    if path == "-":
        if sys.stdout.isatty():
            raise OutputError("refusing to write a binary file to a terminal", path="-",
                              hint="redirect standard output, or name a file with `-o`")  # fmt: skip
        return None
    target = Path(path)
    resolved = Path(os.path.realpath(target))
    try:
        if target.is_symlink() and not target.exists():
            raise OutputError("is a symlink that leads nowhere", path=path)
        found = resolved.stat()
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise OutputError(reason_of(error), path=path) from None
    if found is not None:
        _check_replaceable(resolved, found, path, inputs=inputs, force=force)
    folder = resolved.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", path=path, hint=how_to_make(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in the folder {folder}", path=path)
    if len(os.fsencode(resolved.name)) > _name_limit(folder):
        raise OutputError("the file name is too long", path=path)
    return resolved


def _check_replaceable(
    resolved: Path, found: os.stat_result, path: str, *, inputs: Iterable[Path], force: bool
) -> None:
    for source in inputs:
        if os.path.samestat(found, source.stat()):
            raise OutputError(
                f"is the same file as the input {source}", path=path, hint="choose another name with `-o`"
            )
    if stat.S_ISDIR(found.st_mode):
        raise OutputError("is a directory", path=path)
    if not stat.S_ISREG(found.st_mode):
        raise OutputError("is not a regular file", path=path)
    if not force:
        raise OutputError("exists already", path=path, hint="use `--force` to replace it, or choose a name with `-o`")  # fmt: skip
    if not found.st_mode & 0o222 or not os.access(resolved, os.W_OK):
        raise OutputError("is read-only", path=path)


def _name_limit(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return 255


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises
    ------
    OutputError
        If fewer bytes are free where the target goes.
    """
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(f"no space: need {needed} bytes, {free} are free", path=target)


def reason_of(error: OSError) -> str:
    """What the system says is wrong, in lower case."""
    return (error.strerror or str(error)).lower()
