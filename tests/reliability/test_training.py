"""Training where the disk fills up."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import read, run, succeed
from training.runs import base_file, write_pictures

_COMMAND = (
    "train", "{base}", "images", "--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8,
    "--batch-size", 2, "--device", "cpu", "--steps", 5, "--save-every-n-steps", 2, "--save-state", "--dim", 1,
    "--no-train-te", "--save-dtype", "fp32",
)  # fmt: skip


def _no_room_is_left(is_full: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says of the space that is free, before anything is written."""
    usage = shutil.disk_usage

    def full(path: object) -> object:
        found = usage(path)
        return found._replace(free=0) if is_full() else found

    monkeypatch.setattr(shutil, "disk_usage", full)


def _room_runs_out(is_full: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else takes the space after it was looked at."""
    reserve = os.posix_fallocate

    def full(*arguments: int) -> None:
        if is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (_no_room_is_left, r"no space: need \d+ bytes, 0 are free"),
        (_room_runs_out, "no space left on device"),
    ],
    ids=["before", "during"],
)
def test_full_disk_at_a_checkpoint(
    fill: Callable[..., None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 7; the checkpoint and the state before it are whole, and the same command goes on from there."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")
    command = [str(base_file("sd1")) if part == "{base}" else part for part in _COMMAND]
    succeed(*command, "-o", "straight.safetensors")
    state = tmp_path / "a.state" / "state.json"
    with monkeypatch.context() as disk:
        fill(state.exists, disk)
        ended = run(*command, "-o", "a.safetensors")
    assert ended.exit_code == 7, ended.stderr
    assert not ended.stdout
    assert len([line for line in ended.stderr.splitlines() if "lycotool: error:" in line]) == 1
    assert re.search(message, ended.stderr), ended.stderr
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a-step00000002.safetensors", "a.state"]
    assert not [path for path in tmp_path.rglob("*") if ".lycotool-" in path.name]
    kept, expected = (read(tmp_path / f"{stem}-step00000002.safetensors") for stem in ("a", "straight"))
    assert all(torch.equal(kept[key], expected[key]) for key in expected)
    again = succeed(*command, "-o", "a.safetensors", "--json")
    assert json.loads(again.stdout)["first_step"] == 2
    found, expected = read(tmp_path / "a.safetensors"), read(tmp_path / "straight.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
