"""Read what will be needed next on another thread, in the order of the file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.io.prefetch import prefetched
from lycotool.io.store import CHUNK_BYTES, SafetensorsFile, TensorStore
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes that are read ahead at most, beside the tensor that is worked on.
WINDOW_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that will be asked for: as numbers, or as the bytes that are stored."""

    store: TensorStore
    key: str
    is_copied: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """What is loaded at once: a whole tensor, or some bytes of one that is copied."""

    wanted: Wanted
    start: int
    nbytes: int


class ReadAhead:
    """Tensors in the order they were announced, loaded before they are asked for.

    One thread reads, so that a file is read in its order and can be hashed in passing. What is asked for
    out of turn is read at once. :meth:`close` stops reading.
    """

    def __init__(self, wanted: Iterable[Wanted], *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._turns = deque(wanted)
        parts = (part for one in tuple(self._turns) for part in _parts(one))
        self._loaded: Iterator[tuple[_Part, Tensor]] = prefetched(
            parts, self._load, lambda part: part.nbytes, window=WINDOW_BYTES, workers=1
        )

    def tensor(self, store: TensorStore, key: str) -> Tensor:
        """A tensor as its store gives it."""
        if not self._is_next(key, is_copied=False):
            return store.tensor(key, pinned=self._pinned)
        self._turns.popleft()
        _, loaded = next(self._loaded)
        return loaded

    def chunks(self, store: TensorStore, key: str) -> Iterator[memoryview]:
        """The stored bytes, in pieces that stay as they are."""
        if not self._is_next(key, is_copied=True):
            yield from store.chunks(key)
            return
        wanted = self._turns.popleft()
        for _ in _parts(wanted):
            _, loaded = next(self._loaded)
            if loaded.numel():
                yield loaded.numpy().data

    def close(self) -> None:
        """Read no further."""
        close: Callable[[], None] = self._loaded.close  # type: ignore[attr-defined]
        close()

    def _is_next(self, key: str, *, is_copied: bool) -> bool:
        return bool(self._turns) and (self._turns[0].key, self._turns[0].is_copied) == (key, is_copied)

    def _load(self, part: _Part) -> Tensor:
        wanted = part.wanted
        if not wanted.is_copied:
            return wanted.store.tensor(wanted.key, pinned=self._pinned)
        entry = wanted.store.entries[wanted.key]
        piece = torch.empty(part.nbytes, dtype=torch.uint8)  # of any dtype, also of those torch has not
        if isinstance(entry.file, SafetensorsFile):
            entry.file.read_part(entry.name, part.start, piece.numpy().data)
        else:
            entry.file.read_into(entry.name, piece.numpy().data)
        return piece


def _parts(wanted: Wanted) -> Iterator[_Part]:
    """One part, or several of a large tensor that is copied."""
    entry = wanted.store.entries[wanted.key]
    nbytes = entry.info.nbytes
    if not wanted.is_copied or nbytes <= CHUNK_BYTES or not isinstance(entry.file, SafetensorsFile):
        yield _Part(wanted, 0, nbytes)
        return
    for start in range(0, nbytes, CHUNK_BYTES):
        yield _Part(wanted, start, min(CHUNK_BYTES, nbytes - start))
