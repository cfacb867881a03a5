"""Copies that the system makes from file to file: the same bytes, wherever it stops or refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import lora, run, succeed, write
from safetensors.torch import load_file

from lycotool.io import kernel
from lycotool.io.kernel import copy_range

CALLS = ("copy_file_range", "sendfile")
BYTES = bytes(range(256)) * 4000

needs_calls = pytest.mark.skipif(not all(hasattr(os, call) for call in CALLS), reason="not on this system")


def no_call(number: int) -> Callable[..., int]:
    def refuse(*arguments: object) -> int:
        raise OSError(number, "cannot")

    return refuse


@pytest.mark.parametrize(
    ("start", "stop"), [(0, len(BYTES)), (1000, 700_000), (5, 6), (9, 9), (0, 2 * len(BYTES))]
)
@pytest.mark.parametrize("without", [(), CALLS[:1], CALLS[1:], CALLS])
def test_what_is_copied_is_what_stands_there(
    start: int, stop: int, without: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(BYTES)
    monkeypatch.setattr(kernel, "_CALL_BYTES", 300_000)
    for call in without:
        monkeypatch.setattr(os, call, no_call(errno.EXDEV), raising=False)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb", buffering=0) as target:
        target.write(b"before")
        count = copy_range(source.fileno(), target.fileno(), start, stop)
    assert (tmp_path / "b").read_bytes() == b"before" + BYTES[start : start + count]
    if len(without) < len(CALLS) and all(hasattr(os, call) for call in CALLS):
        assert count == min(stop, len(BYTES)) - start


@needs_calls
def test_a_full_disk_is_no_reason_to_try_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(BYTES)
    monkeypatch.setattr(os, "copy_file_range", no_call(errno.ENOSPC))
    with (
        (tmp_path / "a").open("rb") as source,
        (tmp_path / "b").open("wb", buffering=0) as target,
        pytest.raises(OSError, match="cannot") as caught,
    ):
        copy_range(source.fileno(), target.fileno(), 0, 10)
    assert caught.value.errno == errno.ENOSPC


# --- through bake ---------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with two large tensors that no adapter touches, and an adapter."""
    torch.manual_seed(0)
    tensors = {
        "model.diffusion_model.down.a.weight": torch.randn(6, 5),
        "model.diffusion_model.z.large": torch.randn(700, 600),
        "first_stage_model.b.large": torch.randn(513, 1025).half(),
    }
    return write(tmp_path / "base.safetensors", tensors), write(tmp_path / "x.safetensors", lora())


def bake(inputs: tuple[Path, Path], name: str, *options: str) -> bytes:
    base, adapter = inputs
    succeed("bake", base, adapter, "-o", base.with_name(name), "--device", "cpu", *options)
    return base.with_name(name).read_bytes()


@needs_calls
def test_a_bake_has_large_tensors_copied(inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    read: list[int] = []
    real, real_read = os.copy_file_range, os.preadv

    def copying(source: int, target: int, count: int, offset: int) -> int:
        copied.append(real(source, target, count, offset))
        return copied[-1]

    def reading(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(real_read(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "copy_file_range", copying)
    monkeypatch.setattr(os, "preadv", reading)
    bake(inputs, "a.safetensors")
    assert sorted(copied) == sorted([700 * 600 * 4, 513 * 1025 * 2])
    assert sum(read) < 2**16  # the layer that changes, and the adapter
    found, base = load_file(inputs[0].with_name("a.safetensors")), load_file(inputs[0])
    assert all(torch.equal(found[key], base[key]) for key in base if key.endswith("large"))
    # What is hashed has to be read: then nothing is left to the system.
    copied.clear()
    bake(inputs, "b.safetensors", "--verify")
    assert not copied


@needs_calls
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EINTR])
@pytest.mark.parametrize("after", [0, 1000])
def test_the_bytes_are_the_same_where_the_system_refuses(
    number: int, after: int, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bake(inputs, "a.safetensors")
    real = os.copy_file_range
    calls = 0

    def copying(source: int, target: int, count: int, offset: int) -> int:
        nonlocal calls
        calls += 1
        if number == errno.EINTR and calls % 2:
            raise InterruptedError(number, "again")
        if number != errno.EINTR and calls % 2 == (0 if after else 1):
            raise OSError(number, "cannot")
        return real(source, target, min(count, after or count), offset)

    if number != errno.EINTR:
        monkeypatch.setattr(os, "sendfile", no_call(number))
    monkeypatch.setattr(os, "copy_file_range", copying)
    assert bake(inputs, "b.safetensors") == expected
    assert calls


@needs_calls
def test_a_source_cut_short_is_said(inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range

    def copying(source: int, target: int, count: int, offset: int) -> int:
        os.truncate(inputs[0], offset + 100)
        return real(source, target, count, offset)

    monkeypatch.setattr(os, "copy_file_range", copying)
    result = run("bake", *inputs, "-o", inputs[0].with_name("a.safetensors"), "--device", "cpu")
    assert result.exit_code == 3
    assert "changed while it was read" in result.stderr
    assert not inputs[0].with_name("a.safetensors").exists()
