"""Small pieces of work beside each other, a thread each, rather than each on all threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lycotool.lazy import torch

Thing = TypeVar("Thing")
Result = TypeVar("Result")

#: Between the calls that torch works in by itself, threads wait for Python's lock.
_MOST = 8


def side_by_side(work: Callable[[Thing], Result], things: Sequence[Thing]) -> list[Result]:
    """``work`` of each thing, in order; the first failure, in that order, is raised.

    For hundreds of small tensors on the CPU. torch would divide each among all its threads, which
    takes longer to begin than the work does, a hundred times as long where the threads have to wait
    for a processor. What comes out does not depend on how many threads there are.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if min(count, len(things)) < 2:
            return [work(thing) for thing in things]
        # OpenMP counts threads by the thread that asks, so each worker has to say it too.
        workers = min(count, len(things), _MOST)
        with ThreadPoolExecutor(workers, "lycotool-small", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(work, things))
    finally:
        torch.set_num_threads(count)
