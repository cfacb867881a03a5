"""Read ahead on threads, so that disks and processors work at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def prefetched(
    items: Iterable[Item],
    load: Callable[[Item], Loaded],
    nbytes: Callable[[Item], int],
    *,
    window: int,
    workers: int,
) -> Iterator[tuple[Item, Loaded]]:
    """Each item with what ``load`` gives for it, in order, loaded ahead.

    Parameters
    ----------
    nbytes
        How much memory an item takes once loaded.
    window
        Bytes to be loaded ahead at most; one item is always loaded, however large.

    Raises
    ------
    Exception
        What ``load`` raises, when its item's turn comes; nothing is loaded after that.
    """
    waiting: deque[tuple[Item, int, Future[Loaded]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="lycotool-read") as pool:
        try:
            for item in items:
                size = nbytes(item)
                while waiting and ahead + size > window:
                    first, freed, future = waiting.popleft()
                    yield first, future.result()
                    ahead -= freed
                waiting.append((item, size, pool.submit(load, item)))
                ahead += size
            while waiting:
                first, _, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, _, future in waiting:
                future.cancel()
