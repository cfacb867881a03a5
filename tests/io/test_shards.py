"""Sharded checkpoints: divided, named, and there as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored_tensors import bits

from lycotool.errors import OutputError
from lycotool.io import nameless
from lycotool.io.open import open_store
from lycotool.io.shards import (
    OutputFile,
    SetTarget,
    index_name,
    partition,
    prepare_set,
    shard_names,
    stem_of,
    write_set,
)
from lycotool.io.writer import FilePlan, TensorPlan

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4), "c.weight": torch.zeros(2)}
OLD = {
    "m-00001-of-00003.safetensors": b"1",
    "m-00003-of-00003.safetensors": b"3",
    "m.safetensors.index.json": b"{}",
}


def files(*groups: str, stem: str = "m") -> list[OutputFile]:
    """Shards with the tensors of ``STATE`` whose first letters these are."""
    made = []
    for name, letters in zip(shard_names(stem, len(groups)), groups, strict=True):
        keys = {f"{letter}.weight": f"{letter}.weight" for letter in letters}
        plans = {key: TensorPlan("F32", tuple(STATE[key].shape)) for key in keys}
        made.append(OutputFile(name, FilePlan(plans, {"format": "pt"}), keys))
    return made


def produce(key: str) -> list[memoryview]:
    return [memoryview(bits(STATE[key]))]


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "named":
        monkeypatch.setattr(nameless, "_open_tmpfile", lambda folder: None)
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- dividing ------------------------------------------------------------------------------


@given(
    sizes=st.dictionaries(
        st.from_regex(r"b\.[0-9]{1,3}\.[wxyz]", fullmatch=True), st.integers(0, 50), min_size=1
    ),
    limit=st.integers(1, 80),
    data=st.data(),
)
def test_every_tensor_once_groups_whole_and_shards_within_the_limit(
    sizes: dict[str, int], limit: int, data: st.DataObject
) -> None:
    names = sorted(sizes)
    together = {
        name: data.draw(st.sampled_from(names)) for name in data.draw(st.sets(st.sampled_from(names)))
    }
    # A leader follows nobody, as a weight does not.
    together = {
        name: leader for name, leader in together.items() if leader not in together and leader != name
    }
    shards = partition(sizes, limit, together)
    assert sorted(name for shard in shards for name in shard) == names
    place = {name: number for number, shard in enumerate(shards) for name in shard}
    assert all(place[name] == place[leader] for name, leader in together.items())
    for shard in shards:
        groups = {together.get(name, name) for name in shard}
        assert sum(sizes[name] for name in shard) <= limit or len(groups) == 1
    for shard, after in pairwise(shards):
        first = together.get(after[0], after[0])
        group = [name for name in after if together.get(name, name) == first]
        assert sum(sizes[n] for n in shard) + sum(sizes[n] for n in group) > limit  # none is left half empty


def test_blocks_stand_in_the_order_of_their_numbers() -> None:
    assert partition({"b.10.w": 1, "b.9.w": 1, "a": 1}, 1, {}) == [["a"], ["b.9.w"], ["b.10.w"]]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("model.safetensors", "model"),
        ("model.safetensors.index.json", "model"),
        ("model-00001-of-00012.safetensors", "model"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "diffusion_pytorch_model.fp16"),
        ("pytorch_model.bin", "pytorch_model"),
        ("MODEL.SAFETENSORS", "MODEL"),
        ("a folder", "a folder"),
    ],
)
def test_stems(name: str, stem: str) -> None:
    assert stem_of(name) == stem


def test_index_of_a_variant_is_where_diffusers_looks_for_it() -> None:
    from diffusers.utils.hub_utils import _add_variant

    for variant in (None, "fp16"):
        stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
        assert index_name(stem) == _add_variant("diffusion_pytorch_model.safetensors.index.json", variant)


# --- writing -------------------------------------------------------------------------------


def test_reads_back(tmp_path: Path, way: str) -> None:
    target = prepare_set(str(tmp_path / "m.safetensors"), [], force=False)
    write_set(target, files("a", "bc"), produce)
    assert sorted(contents(tmp_path)) == [
        "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads(target.index.read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in STATE.values())
    found = {key: load_file(tmp_path / name)[key] for key, name in index["weight_map"].items()}
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)
    with open_store(str(target.index)) as store:
        assert store.entries.keys() == STATE.keys()


def test_an_older_set_makes_way_as_a_whole(tmp_path: Path) -> None:
    for name, data in OLD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "m-other.safetensors").write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists already"):
        prepare_set(str(tmp_path / "m.safetensors"), [], force=False)
    target = prepare_set(str(tmp_path / "m.safetensors"), [], force=True)
    write_set(target, files("a", "bc"), produce)
    assert sorted(contents(tmp_path)) == [
        "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m-other.safetensors",
        "m.safetensors.index.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*OLD, "m.safetensors"])
def test_one_file_of_an_older_set_is_enough_to_refuse(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    for output in ("m.safetensors", "m.safetensors.index.json"):
        with pytest.raises(OutputError, match="exists already"):
            prepare_set(str(tmp_path / output), [], force=False)
        with pytest.raises(OutputError, match="the same file as the input"):
            prepare_set(str(tmp_path / output), [tmp_path / name], force=True)


def failing(real: Callable[..., object], number: int) -> Callable[..., object]:
    """A call that fails at its n-th time, counted from 0, and works otherwise."""
    count = -1

    def call(*arguments: object, **more: object) -> object:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    return call


@pytest.mark.parametrize("old", [OLD, {}], ids=["over a set", "new"])
@pytest.mark.parametrize(
    ("owner", "name", "times"),
    [(os, "fsync", 4), (os, "write", 6), (Path, "rename", 3), (Path, "replace", 3), (Path, "chmod", 3)],
    ids=["fsync", "write", "rename", "replace", "chmod"],
)
def test_any_failing_call_leaves_the_folder_as_it_was(
    owner: object, name: str, times: int, old: dict[str, bytes], tmp_path: Path, way: str,
) -> None:  # fmt: skip
    for file, data in old.items():
        (tmp_path / file).write_bytes(data)
    if name == "rename" and not old:
        return  # nothing makes way
    for number in range(times):
        target = prepare_set(str(tmp_path / "m.safetensors"), [], force=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), number))
            with pytest.raises(OutputError, match="no space left"):
                write_set(target, files("a", "bc"), produce)
        assert contents(tmp_path) == old, number
    write_set(target, files("a", "bc"), produce)


def test_a_fault_in_the_last_shard_leaves_nothing(tmp_path: Path, way: str) -> None:
    def stop(key: str) -> list[memoryview]:
        if key == "c.weight":
            raise KeyboardInterrupt
        return produce(key)

    with pytest.raises(KeyboardInterrupt):
        write_set(SetTarget(tmp_path, "m"), files("a", "b", "c"), stop)
    assert contents(tmp_path) == {}


def test_the_index_gets_its_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    real = Path.replace

    def noted(self: Path, target: Path) -> Path:
        named.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    write_set(SetTarget(tmp_path, "m"), files("a", "b", "c"), produce)
    assert named == [*shard_names("m", 3), "m.safetensors.index.json"]


def test_one_file_has_no_index(tmp_path: Path, way: str) -> None:
    """What is small enough stays in one piece, and what was sharded before makes way."""
    for file, data in OLD.items():
        (tmp_path / file).write_bytes(data)
    whole = files("abc")[0]
    target = prepare_set(str(tmp_path / "m.safetensors"), [], force=True)
    write_set(target, [OutputFile("m.safetensors", whole.plan, whole.keys)], produce)
    assert sorted(contents(tmp_path)) == ["m.safetensors"]
    assert torch.equal(load_file(tmp_path / "m.safetensors")["a.weight"], STATE["a.weight"])


def test_an_older_shard_that_cannot_be_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All new files have their names by then."""
    for file, data in OLD.items():
        (tmp_path / file).write_bytes(data)
    target = prepare_set(str(tmp_path / "m.safetensors"), [], force=True)
    real = Path.unlink

    def unlink(self: Path, *, missing_ok: bool = False) -> None:
        if self.name.endswith(".old"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OutputError, match=r"was written, but the older .* cannot be removed: permission"):
        write_set(target, files("a", "bc"), produce)
    with open_store(str(target.index)) as store:
        assert set(store.entries) == set(STATE)


def test_standard_output_is_one_stream() -> None:
    with pytest.raises(OutputError, match="standard output"):
        prepare_set("-", [], force=False)
