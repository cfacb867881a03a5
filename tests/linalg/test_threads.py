"""Small pieces of work beside each other: as one after the other, with torch's threads as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lycotool.linalg.threads import side_by_side


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_in_order_with_one_thread_each(threads: int) -> None:
    gate = threading.Barrier(threads, timeout=30)  # passed only if they run at the same time

    def work(number: int) -> tuple[int, int, str]:
        if number < threads:
            gate.wait()
        return number, torch.get_num_threads(), threading.current_thread().name

    found = side_by_side(work, range(20))
    assert [one[:2] for one in found] == [(number, 1) for number in range(20)]
    assert len({name for *_, name in found}) >= (2 if threads > 1 else 1)
    assert torch.get_num_threads() == threads


def test_the_first_failure_is_raised(threads: int) -> None:
    def work(number: int) -> None:
        if number in (3, 5):
            raise ValueError(number)

    with pytest.raises(ValueError, match="3"):
        side_by_side(work, range(20))
    assert torch.get_num_threads() == threads


def test_nothing_to_do(threads: int) -> None:
    assert side_by_side(str, []) == []
    assert side_by_side(str, [threads]) == [str(threads)]
