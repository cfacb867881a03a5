"""Batches: nothing is lost, groups are of one kind, the bound holds."""

from hypothesis import given
from hypothesis import strategies as st

from lycotool.ops._batches import Batches


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
