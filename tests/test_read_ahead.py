"""Reading ahead: every byte right, and right for as long as somebody may look at it."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lycotool.io.open import open_store
from lycotool.ops import _read_ahead
from lycotool.ops._read_ahead import ReadAhead, Wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples."""
    return tmp_path_factory.mktemp("ahead")


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=60),
    skipped=st.sets(st.integers(0, 59)),
    patience=st.sampled_from([0.0, 0.0005]),
)
def test_pieces_stay_until_the_next_but_one(
    sizes: list[int], skipped: set[int], patience: float, folder: Path
) -> None:
    """A ring of a few small pieces, so that it goes round often while the last two are looked at."""
    import numpy as np

    numbers = np.random.default_rng(sum(sizes))
    tensors = {f"{i:02}": numbers.integers(0, 256, size, dtype=np.uint8) for i, size in enumerate(sizes)}
    save_file(tensors, folder / "x.safetensors")
    with pytest.MonkeyPatch.context() as patch, open_store(str(folder / "x.safetensors")) as store:
        patch.setattr(_read_ahead, "WINDOW_BYTES", 1024)
        patch.setattr(_read_ahead, "CHUNK_BYTES", 256)
        # What was not announced is read out of turn.
        announced = [key for index, key in enumerate(tensors) if index not in skipped]
        ahead = ReadAhead([Wanted(store, key) for key in announced])
        before: tuple[memoryview, bytes] | None = None
        for key, values in tensors.items():
            place = 0
            for piece in ahead.pieces(store, key):
                expected = values.tobytes()[place : place + len(piece)]
                time.sleep(patience)  # the reader goes on as far as it may
                assert piece == expected
                assert before is None or before[0] == before[1]
                before, place = (piece, expected), place + len(piece)
            assert place == len(values)
        ahead.close()


def test_memory_does_not_depend_on_the_size(folder: Path) -> None:
    """One ring serves all pieces."""
    import numpy as np

    size = 3 * _read_ahead.WINDOW_BYTES
    save_file({"a": np.zeros(size, np.uint8)}, folder / "large.safetensors")
    with open_store(str(folder / "large.safetensors")) as store:
        ahead = ReadAhead([Wanted(store, "a")])
        rings = {id(piece.obj): piece.obj.nbytes for piece in ahead.pieces(store, "a")}
        ahead.close()

    assert list(rings.values()) == [_read_ahead.WINDOW_BYTES + 3 * _read_ahead.CHUNK_BYTES]
