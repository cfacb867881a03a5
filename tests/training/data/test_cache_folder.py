"""Cache entries: what is written is what is read, and what is damaged is never served."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lycotool.errors import OutputError
from lycotool.training.data.cache_folder import CacheFolder, key_of

TENSORS = {"mean": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def cache(tmp_path):
    folder = CacheFolder(tmp_path / "deep" / "cache")
    folder.write("k", TENSORS, {"lycotool.image": "a.png"})
    return folder


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_round_trip(cache):
    assert same(cache.read("k"), TENSORS)
    assert same(load_file(cache.path("k")), TENSORS)  # the library reads it, too
    assert cache.read("other") is None
    assert cache.notes == []


def test_same_entry_same_bytes(cache, tmp_path):
    other = CacheFolder(tmp_path / "other")
    other.write("k", dict(reversed(TENSORS.items())), {"lycotool.image": "a.png"})
    assert other.path("k").read_bytes() == cache.path("k").read_bytes()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def garble_the_header(path):
    data = bytearray(path.read_bytes())
    data[20:30] = b"\0" * 10
    path.write_bytes(data)


def write_without_hashes(path):
    save_file(TENSORS, path)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit, garble_the_header, write_without_hashes])
def test_damaged_entries_are_noted_and_not_served(cache, damage):
    damage(cache.path("k"))
    assert cache.read("k") is None
    (note,) = cache.notes
    assert note.startswith(f"{cache.path('k')}: damaged cache entry, computed again: ")
    cache.write("k", TENSORS, {})
    assert same(cache.read("k"), TENSORS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_served(cache, value):
    cache.write("k", {"mean": torch.tensor([0.0, value]), "half": TENSORS["half"]}, {})
    assert cache.read("k") is None
    (note,) = cache.notes
    assert note.endswith("computed again: it has NaN or infinite values")


def test_an_entry_under_anothers_name_is_not_served(cache):
    cache.path("k").rename(cache.path("j"))
    assert cache.read("j") is None
    assert "it is another entry's" in cache.notes[0]


def test_nothing_is_left_beside_the_entries(cache):
    assert [path.name for path in cache.folder.iterdir()] == ["k.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        CacheFolder(tmp_path / "file" / "cache")


def test_keys_are_frozen():
    assert key_of("a", 1, (2, 3)) == KEY
    assert key_of("a", 1, [2, 3]) == KEY
    assert key_of("a", 1, (3, 2)) != KEY


KEY = "45ae95efca27c715b5f2cfb3f5ee9d839b064d5326227442e8724b5ed32915a6"
