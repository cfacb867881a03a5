"""Hashes from bytes that are read anyway: right whatever is read in whatever order, and nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from examples import many
from helpers import lora, run, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lycotool.errors import BadInputError
from lycotool.io import passing, store
from lycotool.io.passing import PassingHash
from lycotool.io.store import SafetensorsFile

DATA = bytes(range(256)) * 40


@many
@given(
    reads=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 4000)), max_size=12),
    data_start=st.integers(0, len(DATA)),
    gap=st.sampled_from([0, 7, 10**6]),
    aside=st.sampled_from([1, 50, 10**6]),
)
def test_any_reads_in_any_order(reads: list[tuple[int, int]], data_start: int, gap: int, aside: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passing, "_GAP_BYTES", gap)
        patch.setattr(passing, "_CHUNK_BYTES", 1000)
        patch.setattr(passing, "_ASIDE", aside)

        def read_at(place: int, buffer: memoryview) -> int:
            found = DATA[place : place + len(buffer)]
            buffer[: len(found)] = found
            return len(found)

        passed = PassingHash(read_at, data_start, len(DATA), with_data=True)
        for start, count in reads:
            passed.saw(start, memoryview(DATA[start : start + count]))
        whole, data = (hashlib.sha256(part).hexdigest() for part in (DATA, DATA[data_start:]))
        assert passed.finish() == (whole, data)
        assert passed.finish() == (whole, data)


class Counted:
    """How many bytes of each file are read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes: Counter[str] = Counter()
        real = os.preadv

        def preadv(descriptor: int, buffers: list[memoryview], place: int) -> int:
            count = real(descriptor, buffers, place)
            self.bytes[Path(f"/proc/self/fd/{descriptor}").readlink().name] += count
            return count

        patch.setattr(store.os, "preadv", preadv)


def checkpoint() -> dict[str, torch.Tensor]:
    """Weights of two dtypes, one of which no adapter changes, and a large one that is copied in pieces."""
    return {
        "unet.down.a.weight": torch.randn(6, 5),
        "unet.b.weight": torch.randn(64, 64).half(),
        "unet.large.weight": torch.randn(2100, 2100).half(),
    }


@pytest.mark.parametrize("command", ["merge", "bake"])
def test_no_input_is_read_twice(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.safetensors", checkpoint())
    write(tmp_path / "a.safetensors", lora(out=6, width=5))
    counted = Counted(monkeypatch)
    monkeypatch.setattr(store, "CHUNK_BYTES", 2**20)
    result = run(command, "base.safetensors", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 0, result.stderr
    alpha = 8  # is looked at before, to know the ranks and scales
    for name, more in {"base.safetensors": 0, "a.safetensors": alpha}.items():
        assert 0 < counted.bytes[name] <= (tmp_path / name).stat().st_size + more
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        said = json.loads(out.metadata()[f"lycotool.{command}"])
    hashes = [entry["sha256"] for entry in said["inputs" if command == "merge" else "adapters"]]
    files = ["base.safetensors", "a.safetensors"] if command == "merge" else ["a.safetensors"]
    assert hashes == [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files]


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_check_reads_once(is_adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes, values, and of an adapter the strengths of its modules."""
    path = write(tmp_path / "x.safetensors", lora(out=60, width=50) if is_adapter else checkpoint())
    if not is_adapter:
        monkeypatch.setattr(store, "KEPT_BYTES", 0)  # as if it were large
    counted = Counted(monkeypatch)
    result = run("inspect", path, "--check", "--hashes", "--json")
    assert result.exit_code in (0, 10), result.stderr
    row = json.loads(result.stdout)["files"][0]["hashes"][0]
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert 0 < counted.bytes["x.safetensors"] <= path.stat().st_size + 8  # the alpha


def test_a_kept_file_gives_what_the_file_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.safetensors", checkpoint())
    counted = Counted(monkeypatch)
    file = SafetensorsFile(path)
    file.keep()
    file.keep()
    assert counted.bytes["x.safetensors"] == path.stat().st_size
    raw = path.read_bytes()
    assert file.sha256() == hashlib.sha256(raw).hexdigest()
    assert file.data_sha256() == hashlib.sha256(raw[file.data_start :]).hexdigest()
    for name, info in file.tensors.items():
        assert b"".join(file.chunks(name)) == raw[file.data_start + info.start : file.data_start + info.stop]
    assert counted.bytes["x.safetensors"] == path.stat().st_size
    file.close()


@pytest.mark.parametrize("kept", [False, True])
def test_a_change_meanwhile_is_an_error(kept: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", checkpoint())
    file = SafetensorsFile(path)
    if not kept:
        file.hash_in_passing()
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadInputError, match="changed while it was read"):
        _ = file.keep() if kept else file.sha256()
    file.close()
