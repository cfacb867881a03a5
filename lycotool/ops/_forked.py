"""The same work on many things, shared out among processes that begin as copies of this one.

For work on Python objects, which threads do one after the other. A copy has everything imported
already and costs some milliseconds; there are none where the system has no ``fork``, one processor,
or few things.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lycotool.devices import processors

Thing = TypeVar("Thing")
Result = TypeVar("Result")

#: Things that are worth a process.
_SHARE = 48
_MOST = 16


def mapped(work: Callable[[Thing], Result | None], things: Sequence[Thing]) -> Iterator[Result | None]:
    """``work`` of each thing, in order; None where it gave that, and where no process answered.

    Parameters
    ----------
    work
        Raises nothing; what it gives is pickled.
    """
    count = min(processors(), _MOST, len(things) // _SHARE)
    # A copy of a process with other threads may wait for ever for what one of them held.
    if count < 2 or not hasattr(os, "fork") or threading.active_count() > 1 or "torch" in sys.modules:
        yield from map(work, things)
        return
    bounds = [len(things) * number // count for number in range(count + 1)]
    shares = [things[start:stop] for start, stop in itertools.pairwise(bounds)]
    children: list[tuple[int, int]] = []
    try:
        children.extend(_child(work, share) for share in shares[1:])
        yield from map(work, shares[0])
        for (_, pipe), share in zip(children, shares[1:], strict=False):
            yield from _answer(pipe, len(share))
        for share in shares[1 + len(children) :]:
            yield from map(work, share)
    finally:
        for child, pipe in children:
            with contextlib.suppress(OSError):
                os.close(pipe)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # it has answered, or is not asked any more
            os.waitpid(child, 0)


def _child(work: Callable[[Thing], Result | None], share: Sequence[Thing]) -> tuple[int, int]:
    """A process that works on a share; its number, and where it answers."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:  # in the copy, which must never return
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(reading)
        answer = memoryview(pickle.dumps([work(thing) for thing in share]))
        while answer:
            answer = answer[os.write(writing, answer) :]
    finally:
        os._exit(0)


def _answer(pipe: int, count: int) -> Sequence[Result | None]:
    """What a process found, or nothing for each thing if it died."""
    with os.fdopen(os.dup(pipe), "rb") as file:
        try:
            found: list[Result | None] = pickle.loads(file.read())  # noqa: S301 - from ourselves
        except (EOFError, pickle.UnpicklingError):
            return [None] * count
    return found
