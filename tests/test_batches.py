"""Batches: nothing is lost, groups are of one kind, the bound holds."""

import threading
from contextvars import ContextVar

import pytest
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.ops._batches import Batches, in_background


@many
@given(things=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9))), limit=st.integers(0, 30))
def test_every_thing_is_worked_on_once_with_its_kind(things: list[tuple[int, int]], limit: int) -> None:
    done: list[tuple[int, tuple[int, int]]] = []
    held = 0

    def work(group: list[tuple[int, tuple[int, int]]]) -> None:
        nonlocal held
        assert len({kind for _, (kind, _) in group}) == 1
        done.extend(group)
        held -= sum(size for _, (_, size) in group)

    batches = Batches(work, limit=limit)
    for index, (kind, size) in enumerate(things):
        held += size
        batches.add(kind, (index, (kind, size)), size)
        assert held <= limit
    batches.finish()

    assert sorted(done) == list(enumerate(things))


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_work_in_the_background_is_done_when_it_is_left(at_once: int) -> None:
    setting: ContextVar[int] = ContextVar("setting", default=0)
    setting.set(7)
    done: list[tuple[int, int]] = []
    running = 0
    most = 0
    lock = threading.Lock()

    def work(group: list[int]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        done.append((sum(group), setting.get()))
        with lock:
            running -= 1

    with in_background(work, at_once) as submit:
        for number in range(20):
            submit([number, 1])

    assert sorted(done) == [(number + 1, 7) for number in range(20)]
    assert most <= max(1, at_once)


@pytest.mark.parametrize("at_once", [0, 2])
def test_an_error_in_the_background_comes_back(at_once: int) -> None:
    def work(group: list[int]) -> None:
        if group == [3]:
            raise ArithmeticError("three")

    def submit_all() -> None:
        with in_background(work, at_once) as submit:
            for number in range(9):
                submit([number])

    with pytest.raises(ArithmeticError, match="three"):
        submit_all()
