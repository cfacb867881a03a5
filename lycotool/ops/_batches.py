"""Collect things of one kind until there are enough of them to be worked on together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Batches(Generic[Thing]):
    """Groups by kind, bounded in bytes.

    Parameters
    ----------
    work
        Called with each finished group, in no particular order.
    limit
        Bytes to hold back. Above that the largest group is worked on; 0 holds nothing back.
    """

    def __init__(self, work: Callable[[list[Thing]], None], *, limit: int) -> None:
        self._work, self._limit = work, limit
        self._groups: dict[Hashable, list[Thing]] = {}
        self._nbytes: dict[Hashable, int] = {}

    def add(self, kind: Hashable, thing: Thing, nbytes: int) -> None:
        """Hold a thing back until its group's turn."""
        self._groups.setdefault(kind, []).append(thing)
        self._nbytes[kind] = self._nbytes.get(kind, 0) + nbytes
        while sum(self._nbytes.values()) > self._limit:
            self._finish(max(self._nbytes, key=lambda kind: self._nbytes[kind]))

    def finish(self) -> None:
        """Work on everything that is left."""
        while self._groups:
            self._finish(next(iter(self._groups)))

    def _finish(self, kind: Hashable) -> None:
        del self._nbytes[kind]
        self._work(self._groups.pop(kind))
