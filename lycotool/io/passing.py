"""SHA-256 of files from the bytes that are read of them anyway, so that none is read twice.

A file whose tensors are read in their order is hashed by whoever reads them; what was left out, or
was read out of turn, is read at the end. A small file is read whole at once and kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: Bytes of a file that are kept in memory once they have been read for a hash.
KEPT_BYTES = 128 * 2**20

#: Bytes that are read at once where nobody else does.
_CHUNK_BYTES = 8 * 2**20

#: A gap of so many bytes before what was read is read too, rather than all that follows later.
_GAP_BYTES = 2**20

#: Pieces of which both hashes are computed at once.
_ASIDE = 2**20

#: ``(place in the file, buffer)``: read so much of the file; gives how much there was.
ReadAt = Callable[[int, memoryview], int]


class PassingHash:
    """SHA-256 of a whole file and of its data section.

    Parameters
    ----------
    read_at
        Reads at a place of the file.
    data_start, size
        Where the data section begins, and where the file ends.
    with_data
        Whether the data section has a hash of its own too.
    """

    def __init__(self, read_at: ReadAt, data_start: int, size: int, *, with_data: bool = False) -> None:
        import hashlib  # headers are read without

        self._read_at, self._size = read_at, size
        self._whole = hashlib.sha256()
        self._data = hashlib.sha256() if with_data else None
        self._data_start = data_start
        self._position = 0
        self._lock = threading.Lock()
        self._read_until(data_start, lambda: None)

    def saw(self, start: int, buffer: memoryview) -> None:
        """Take bytes that were read at ``start``; they are not needed any more when this returns."""
        with self._lock:
            if 0 < start - self._position <= _GAP_BYTES:
                self._read_until(start, lambda: None)
            passed = self._position - start
            if 0 <= passed < len(buffer):
                self._take(buffer[passed:])

    def finish(self, look: Callable[[], None] = lambda: None) -> tuple[str, str | None]:
        """The hashes, once the rest has been read.

        Parameters
        ----------
        look
            Called between pieces; may raise to give up.
        """
        with self._lock:
            self._read_until(self._size, look)
            return self._whole.hexdigest(), None if self._data is None else self._data.hexdigest()

    def _read_until(self, stop: int, look: Callable[[], None]) -> None:
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, stop - self._position)))
        while self._position < stop:
            look()
            count = self._read_at(self._position, buffer[: stop - self._position])
            if not count:
                raise OSError(0, "the file changed while it was read: it is shorter than it was")
            self._take(buffer[:count])

    def _take(self, piece: memoryview) -> None:
        data = piece[max(0, self._data_start - self._position) :]
        if self._data is None or not data:
            self._whole.update(piece)
        elif len(data) < _ASIDE:
            self._whole.update(piece)
            self._data.update(data)
        else:
            aside = threading.Thread(target=self._data.update, args=(data,), name="lycotool-hash")
            aside.start()
            self._whole.update(piece)
            aside.join()
        self._position += len(piece)
