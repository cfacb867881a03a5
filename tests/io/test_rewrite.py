"""Another header for the same data: the bytes, and what happens when the file changes meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from stored_tensors import bits, names, state_dicts, text

from lycotool.errors import BadInputError, OutputError
from lycotool.io import kernel, rewrite, store
from lycotool.io.header import read_header
from lycotool.io.rewrite import header_with
from lycotool.io.store import SafetensorsFile

STATE = {"a": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.uint8)}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SafetensorsFile]:
    (tmp_path / "x.safetensors").write_bytes(save(STATE, {"k": "v"}))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    yield file
    file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rewritten")


@settings(deadline=None, max_examples=60)
@given(
    state=state_dicts(),
    metadata=st.dictionaries(names, text, max_size=4),
    chunk=st.sampled_from([1, 7, 2**23]),
    by_system=st.booleans(),
)
def test_tensors_stay_and_metadata_are_new(
    folder: Path, state: dict[str, torch.Tensor], metadata: dict[str, str], chunk: int, by_system: bool
) -> None:
    path, target = folder / "x.safetensors", folder / "y.safetensors"
    path.write_bytes(save(state, {"old": "metadata"}))
    file = SafetensorsFile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", chunk)
        if not by_system:  # another file system, an old kernel
            patch.setattr(store, "copy_range", lambda *arguments: 0)
        rewrite.rewrite(file, header_with(file, metadata), target)
    file.close()
    with safe_open(target, "pt") as found:
        assert (found.metadata() or {}) == metadata
        assert {name: bits(found.get_tensor(name)) for name in found.keys()} == {  # noqa: SIM118
            name: bits(tensor) for name, tensor in state.items()
        }


def test_data_keeps_its_place_in_blocks(source: SafetensorsFile, tmp_path: Path) -> None:
    """What file systems that share blocks ask for."""
    target = tmp_path / "y.safetensors"
    rewrite.rewrite(source, header_with(source, {"k": "v" * 9000}), target)
    with target.open("rb") as file:
        found = read_header(file, target.stat().st_size, target)
    assert (found.data_start - source.data_start) % 4096 == 0


@pytest.mark.parametrize("change", ["overwritten", "longer", "cut", "empty"])
def test_a_file_that_changes_is_not_rewritten(change: str, source: SafetensorsFile, tmp_path: Path) -> None:
    """Its old header would name places in other data."""
    target = tmp_path / "y.safetensors"
    target.write_bytes(b"old")
    header = header_with(source, {})
    data = bytearray(source.path.read_bytes())
    if change == "overwritten":
        data[-1] ^= 1
    with source.path.open("r+b") as file:  # the same file, not another of its name
        file.write(data)
        file.truncate({"longer": len(data) + 1, "cut": len(data) - 1, "empty": 0}.get(change, len(data)))
    later = source.path.stat().st_mtime_ns + 1
    os.utime(source.path, ns=(later, later))
    with pytest.raises(BadInputError, match="changed while it was read"):
        rewrite.rewrite(source, header, target)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]


def test_the_file_that_was_opened_is_rewritten(source: SafetensorsFile, tmp_path: Path) -> None:
    """Not another one that has taken its name since: the header would name places in other data."""
    (tmp_path / "other").write_bytes(save({"a": torch.zeros(7)}))
    (tmp_path / "other").replace(source.path)
    rewrite.rewrite(source, header_with(source, {}), tmp_path / "y.safetensors")
    assert torch.equal(load_file(tmp_path / "y.safetensors")["a"], STATE["a"])


def test_a_file_that_does_not_read_back_is_not_published(
    source: SafetensorsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = header_with(source, {}).replace(b'"b"', b'"c"')
    with pytest.raises(OutputError, match="does not read back as planned"):
        rewrite.rewrite(source, header, tmp_path / "y.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_header_readers_would_refuse(source: SafetensorsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "MAX_HEADER_BYTES", 100)
    with pytest.raises(OutputError, match="readers refuse it"):
        header_with(source, {})


def test_a_full_disk_says_so(
    source: SafetensorsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store, "copy_range", full)
    assert kernel.copy_range is not full
    with pytest.raises(OutputError, match="no space left on device"):
        rewrite.rewrite(source, header_with(source, {}), tmp_path / "y.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
