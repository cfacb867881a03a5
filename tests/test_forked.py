"""Work shared out among copies of this process: the same results, in order, whatever becomes of the copies."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from lycotool.ops import _forked
from lycotool.ops._forked import mapped


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processors, and nothing that speaks against copies; pytest's own threads are asleep."""
    monkeypatch.setattr(_forked, "processors", lambda: 3)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
@pytest.mark.parametrize("count", [0, 1, 95, 96, 97, 500])
@pytest.mark.usefixtures("several")
def test_as_map_does(count: int) -> None:
    found = list(mapped(lambda number: None if number % 7 == 3 else (number, os.getpid()), range(count)))
    assert [None if one is None else one[0] for one in found] == [
        None if number % 7 == 3 else number for number in range(count)
    ]
    assert len({one[1] for one in found if one}) == (min(3, count // 48) if count >= 96 else min(count, 1))


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
@pytest.mark.usefixtures("several")
def test_a_copy_that_dies_answers_nothing() -> None:
    parent = os.getpid()

    def work(number: int) -> int:
        if os.getpid() != parent and number == 120:
            os._exit(9)
        return number

    found = list(mapped(work, range(150)))
    assert [one for one in found if one is not None] == list(range(100))
    assert len(found) == 150


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
@pytest.mark.usefixtures("several")
def test_stopping_early_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []
    fork = os.fork

    def noting() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(os, "fork", noting)
    results = mapped(lambda number: number, range(200))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(children) == 2
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
