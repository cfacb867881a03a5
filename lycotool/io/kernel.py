"""Bytes from one file to another without their passing through this process.

``copy_file_range`` lets file systems that can share blocks (Btrfs, XFS, ZFS, bcachefs) copy nothing
at all; elsewhere it and ``sendfile`` copy in the kernel, at a third to a fifth of the processor's time.
"""

from __future__ import annotations

import errno
import os

#: Bytes of one call: what a Ctrl-C waits for.
_CALL_BYTES = 2**26

#: What the calls say where they cannot: another file system, an old kernel, a pipe, no file.
_CANNOT = (
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTSOCK,
)  # fmt: skip


def copy_range(source: int, target: int, start: int, stop: int) -> int:
    """Write ``source[start:stop]`` at the place where ``target`` stands, as far as the system does that.

    Parameters
    ----------
    source, target
        Descriptors.

    Returns
    -------
    int
        How many bytes of them were copied: fewer where the system cannot, or the source ends.

    Raises
    ------
    OSError
        If there is no room, or a disk fails.
    """
    position = start
    for call in ("copy_file_range", "sendfile"):
        while position < stop and hasattr(os, call):
            count = min(stop - position, _CALL_BYTES)
            try:
                if call == "copy_file_range":
                    copied = os.copy_file_range(source, target, count, position)
                else:
                    copied = os.sendfile(target, source, position, count)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in _CANNOT:
                    break
                raise
            if not copied:
                return position - start
            position += copied
    return position - start
