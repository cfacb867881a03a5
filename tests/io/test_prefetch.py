"""Reading ahead: order, bounds, errors."""

from __future__ import annotations

import threading
import time

import pytest

from lycotool.io.prefetch import prefetched


def test_results_come_in_order() -> None:
    def load(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    found = list(prefetched(range(30), load, lambda item: 1, window=8, workers=4))

    assert found == [(item, item * item) for item in range(30)]


@pytest.mark.parametrize(("sizes", "window"), [([1] * 20, 4), ([3, 100, 3, 3], 10), ([5], 1)], ids=str)
def test_no_more_than_the_window_is_loaded_ahead(sizes: list[int], window: int) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def load(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    taken = 0
    for item, _ in prefetched(range(len(sizes)), load, lambda item: sizes[item], window=window, workers=3):
        with lock:
            ahead = sum(sizes[i] for i in begun if i >= item)
        assert ahead <= max(window, sizes[item])
        taken += 1
    assert taken == len(sizes)


def test_an_error_comes_in_its_turn_and_stops_the_rest() -> None:
    begun: list[int] = []

    def load(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise OSError("gone")
        return item

    seen: list[int] = []

    def consume() -> None:
        for item, _ in prefetched(range(1000), load, lambda item: 1, window=5, workers=2):
            seen.append(item)

    with pytest.raises(OSError, match="gone"):
        consume()

    assert seen == [0, 1, 2]
    assert len(begun) < 20


def test_leaving_early_leaves_no_thread() -> None:
    for item, _ in prefetched(range(100), lambda item: item, lambda item: 1, window=5, workers=3):
        if item == 2:
            break
    deadline = time.monotonic() + 5
    while any(t.name.startswith("lycotool-read") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
