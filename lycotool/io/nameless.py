"""Files that nobody sees until they are finished.

An ``O_TMPFILE`` has no name at all and vanishes with its descriptor; where the platform has
none, a hidden file in the same folder takes its place and is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lycotool.io.preflight import reason_of

#: Beginning of a temporary file's name, so that litter after a power cut is recognisable.
TEMPORARY_PREFIX = ".lycotool-"


def temporary_beside(target: Path, ending: str = "tmp") -> Path:
    """A hidden name in the target's folder, for something that takes the target's name later."""
    return target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.{ending}"


class NamelessFile:
    """A file being written, which :meth:`publish` gives the target's name.

    Attributes
    ----------
    descriptor
        Open for reading and writing.
    path
        Where it can be opened for reading before it has its name.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = temporary_beside(target)
        descriptor = _open_tmpfile(target.parent)
        self._is_named = descriptor is None
        if descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self._temporary, flags, 0o600)
        self.descriptor = descriptor
        self._is_open = True

    @property
    def path(self) -> Path:
        """A name to read it by, as long as it is open."""
        return self._temporary if self._is_named else Path(f"/proc/self/fd/{self.descriptor}")

    def publish(self, *, flushed: bool = True) -> None:
        """Give it the target's name, replacing what had it, with the permissions that one had.

        Parameters
        ----------
        flushed
            Whether the folder is flushed to disk too; False where the caller does that once for
            several files.

        Raises
        ------
        OSError
            If anything fails. Only the last step, the folder's flush, comes after the new name;
            its error says so.
        """
        with uninterrupted():
            mode = _mode_for(self._target)
            if not self._is_named:
                self._is_named = True
                _link_descriptor(self.descriptor, self._temporary)
            self._is_open = False  # whatever close says, the descriptor is gone
            os.close(self.descriptor)  # before the rename: Windows refuses to replace an open file
            self._temporary.chmod(mode)
            self._temporary.replace(self._target)
            self._is_named = False
            if flushed:
                flush_name(self._target)

    def discard(self) -> None:
        """Remove it unless it was published."""
        try:
            if self._is_open:
                self._is_open = False
                os.close(self.descriptor)
        finally:
            if self._is_named:
                with contextlib.suppress(FileNotFoundError):
                    self._temporary.unlink()


@contextlib.contextmanager
def nameless_file(target: Path) -> Iterator[NamelessFile]:
    """A new file for ``target``; without :meth:`NamelessFile.publish` nothing remains."""
    file = NamelessFile(target)
    try:
        yield file
    finally:
        file.discard()


def _mode_for(target: Path) -> int:
    """The old file's permissions, or those any new file gets."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _open_tmpfile(folder: Path) -> int | None:
    """A file without a name in ``folder``, or None where the platform has none."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return None
        raise


def _link_descriptor(descriptor: int, name: Path) -> None:
    # Without a directory descriptor CPython calls link(2), which links the /proc symlink
    # itself and fails across file systems; with one it calls linkat with AT_SYMLINK_FOLLOW.
    root = os.open("/", os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=root, follow_symlinks=True)
    finally:
        os.close(root)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the body, which takes several steps and must not stop between them."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in that one alone
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for arrival, frame in arrived:
            handler = before[signal.Signals(arrival)]
            if callable(handler):
                handler(arrival, frame)
            else:
                signal.raise_signal(arrival)


#: `renameat2`'s flag, and what it says where it cannot.
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders change names in one step; False where the system has no such step.

    Raises
    ------
    OSError
        If it has, and it failed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    if call(-100, os.fsencode(first), -100, os.fsencode(second), _RENAME_EXCHANGE) == 0:  # -100: AT_FDCWD
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number))


def flush_name(target: Path) -> None:
    """Have the new name of a file that is finished on disk.

    Raises
    ------
    OSError
        Saying that the file is there all the same.
    """
    try:
        fsync_folder(target.parent)
    except OSError as error:
        reason = f"was written, but its folder cannot be flushed to disk: {reason_of(error)}"
        raise OSError(error.errno, reason) from error


def fsync_folder(folder: Path) -> None:
    """Have a folder's entries on disk, where the file system can."""
    if os.name == "nt":  # pragma: no cover - directories cannot be opened on Windows, which no test runs on
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
