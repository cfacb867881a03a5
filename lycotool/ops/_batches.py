"""Collect things of one kind until there are enough of them, and work on them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
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


@contextmanager
def in_background(
    work: Callable[[list[Thing]], None], at_once: int
) -> Iterator[Callable[[list[Thing]], None]]:
    """``work`` on other threads, so many groups at once; a further one waits for the oldest.

    Leaving waits for all of them.

    Parameters
    ----------
    at_once
        0 works at once, on this thread.

    Raises
    ------
    Exception
        What ``work`` raises, at a later call or on leaving.
    """
    if at_once == 0:
        yield work
        return
    running: deque[Future[None]] = deque()

    def submit(group: list[Thing]) -> None:
        while len(running) >= at_once:
            running.popleft().result()
        running.append(pool.submit(copy_context().run, work, group))

    with ThreadPoolExecutor(at_once, "lycotool-work") as pool:
        yield submit
        while running:
            running.popleft().result()
