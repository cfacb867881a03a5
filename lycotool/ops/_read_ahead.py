"""Read what will be needed next on another thread, in the order of the file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lycotool.io.prefetch import prefetched
from lycotool.io.store import CHUNK_BYTES, SafetensorsFile, TensorStore
from lycotool.lazy import torch

#: Bytes that are read ahead at most, beside the pieces that are worked on.
WINDOW_BYTES = 32 * 2**20

#: Where pieces begin in the ring: a place where numbers of any dtype may stand.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that will be asked for, as this store has it."""

    store: TensorStore
    key: str


@dataclass(frozen=True, slots=True)
class _Part:
    """What is loaded at once: some bytes of a tensor, or all of one that no safetensors file has."""

    wanted: Wanted
    start: int
    nbytes: int

    @property
    def room(self) -> int:
        """Bytes of the ring that it takes."""
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT


class ReadAhead:
    """The bytes of tensors in the order they were announced, loaded before they are asked for.

    One thread reads, so that a file is read in its order and can be hashed in passing. What is asked for
    out of turn is read at once. :meth:`close` stops reading.

    The pieces stand in one ring of memory, because the system gives out none that is not zeroed. It is never
    written where somebody reads: at most the window, the piece that was asked for last and the one before it
    are in use, and what is left free at its end is less than a piece.
    """

    def __init__(self, wanted: Iterable[Wanted], *, pinned: bool = False) -> None:
        self._turns = deque(wanted)
        self._pinned = pinned
        self._ring: memoryview | None = None
        self._place = 0
        parts = (part for one in tuple(self._turns) for part in _parts(one))
        self._loaded: Iterator[tuple[_Part, memoryview]] = prefetched(
            parts, self._load, lambda part: part.room, window=WINDOW_BYTES, workers=1
        )

    def pieces(self, store: TensorStore, key: str) -> Iterator[memoryview]:
        """The bytes as the store has them; each piece stays as it is until the next but one is asked for."""
        turn = self._turns[0] if self._turns else None
        if turn is None or turn.store is not store or turn.key != key:
            yield from store.chunks(key)
            return
        for _ in _parts(self._turns.popleft()):
            _, piece = next(self._loaded)
            if piece.nbytes:
                yield piece

    def close(self) -> None:
        """Read no further."""
        close: Callable[[], None] = self._loaded.close  # type: ignore[attr-defined]
        close()

    def _load(self, part: _Part) -> memoryview:
        if not part.nbytes:
            return memoryview(b"")
        entry = part.wanted.store.entries[part.wanted.key]
        if not isinstance(entry.file, SafetensorsFile):
            whole = _memory(part.nbytes, pinned=self._pinned)
            entry.file.read_into(entry.name, whole)
            return whole
        if self._ring is None:
            self._ring = _memory(WINDOW_BYTES + 3 * CHUNK_BYTES, pinned=self._pinned)
        if self._place + part.room > len(self._ring):
            self._place = 0
        piece = self._ring[self._place : self._place + part.nbytes]
        self._place += part.room
        entry.file.read_part(entry.name, part.start, piece)
        return piece


def _memory(nbytes: int, *, pinned: bool) -> memoryview:
    """Memory that is not zeroed, page-locked where a GPU shall copy from it by itself."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy().data


def _parts(wanted: Wanted) -> Iterator[_Part]:
    """One part, or several of a large tensor in a safetensors file."""
    entry = wanted.store.entries[wanted.key]
    nbytes = entry.info.nbytes
    if nbytes <= CHUNK_BYTES or not isinstance(entry.file, SafetensorsFile):
        yield _Part(wanted, 0, nbytes)
        return
    for start in range(0, nbytes, CHUNK_BYTES):
        yield _Part(wanted, start, min(CHUNK_BYTES, nbytes - start))
