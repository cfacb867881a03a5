"""Memory, time, threads: what a run may take, and that its bytes do not depend on them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run, succeed

from reliability.cases import OUT, VERBS, WRITING
from reliability.lab import OK, RESOURCE, USAGE, Server, Setting, watched
from reliability.sizes import MIB, SIZED, measured
from reliability.tensors import TEXT, TEXT_WEIGHT, UNET, UNET_WEIGHT, companions, numbers, stored

MEMORY_VERBS = ("resize", "merge", "bake", "convert", "subtract")


@pytest.mark.parametrize("verb", MEMORY_VERBS)
def test_memory_ladder(verb: str, server: Server, tmp_path: Path) -> None:
    """Address space for less and less beyond what the idle program has: done, or exit 8, and nothing left."""
    companions(tmp_path)
    argv = [part.replace("{x}", "good.safetensors") for part in VERBS[verb]]
    codes = memory_ladder(server, tmp_path, argv, steps=(256, 32, 8, 1))
    assert codes[0] == OK


def memory_ladder(server: Server, folder: Path, argv: list[str], steps: tuple[int, ...]) -> list[int]:
    """Exit codes with so many MiB of address space beyond the idle program's."""
    codes = []
    for step in steps:
        before = watched(folder)
        ended = server.run(folder, argv, Setting(limits={"AS": step * MIB}))
        assert ended.code in (OK, RESOURCE), f"{step} MiB: {ended.text}"
        before.check(ended)
        codes.append(ended.code)
        (folder / OUT).unlink(missing_ok=True)
    return codes


def test_gpu_memory_runs_out(server: Server, tmp_path: Path) -> None:
    """A GPU's own error, raised where a weight changes: exit 8, and the way on."""
    companions(tmp_path)
    before = watched(tmp_path)
    raising = Setting(patch="lycotool.ops._bake_tensors._change:torch.OutOfMemoryError")
    ended = server.run(tmp_path, ["bake", "base.safetensors", "good.safetensors", "-o", OUT], raising)
    assert ended.code == RESOURCE, ended.text
    assert b"--device cpu" in ended.stderr
    before.check(ended)


def test_memory_is_what_is_documented(server: Server, tmp_path: Path) -> None:
    """Of a checkpoint of 160 MiB in layers of 4, and of an adapter of 24: what files.md says, command by command.

    A check keeps files of up to 128 MiB, to read them once; this one is larger.
    """
    for one in measured(server, tmp_path, list(SIZED), megabytes=160, layer=4, adapter=24):
        assert one.peak <= one.bound, f"{one.name}: {one.peak / MIB:.0f} MiB of {one.bound / MIB:.0f}"


def wide(folder: Path) -> None:
    """Inputs whose products are shared out among threads: layers of 512 by 512."""
    width, rank = 512, 48
    adapter = {}
    for seed, module in enumerate((UNET, TEXT)):
        adapter[f"{module}.lora_down.weight"] = numbers(rank, width, seed=seed)
        adapter[f"{module}.lora_up.weight"] = numbers(width, rank, seed=seed + 2)
        adapter[f"{module}.alpha"] = torch.tensor(rank / 2)
    base = {name: numbers(width, width, seed=5) for name in (UNET_WEIGHT, TEXT_WEIGHT)}
    tuned = {name: tensor + numbers(width, width, seed=7) for name, tensor in base.items()}
    (folder / "good.safetensors").write_bytes(stored(adapter))
    (folder / "base.safetensors").write_bytes(stored(base, None))
    (folder / "tuned.safetensors").write_bytes(stored(tuned, None))


@pytest.mark.parametrize("verb", WRITING)
def test_threads_give_the_same_bytes(verb: str, server: Server, tmp_path: Path) -> None:
    wide(tmp_path)
    argv = [part.replace("{x}", "good.safetensors") for part in VERBS[verb]]
    digests = set()
    for threads in (1, 2, 4):
        ended = server.run(tmp_path, argv, Setting(threads=threads))
        assert ended.code == OK, ended.text
        digests.add(hashlib.sha256((tmp_path / OUT).read_bytes()).hexdigest())
        (tmp_path / OUT).unlink()
    assert len(digests) == 1


def test_a_fork_gives_the_bytes_of_a_fresh_process(server: Server, tmp_path: Path) -> None:
    """The other tests run commands in forks of one process; here is one that users start."""
    companions(tmp_path)
    argv = [part.replace("{x}", "good.safetensors") for part in VERBS["merge"]]
    ended = server.run(tmp_path, argv)
    assert ended.code == OK, ended.text
    first = (tmp_path / OUT).read_bytes()
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "lycotool", *argv, "--force"]
    alone = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / OUT).read_bytes() == first
    assert (alone.stdout, alone.stderr) == (ended.stdout, ended.stderr)


def test_the_other_byte_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and single numbers are read as little-endian everywhere; tensors are not turned round."""
    companions(tmp_path)
    monkeypatch.chdir(tmp_path)
    inspected = succeed("inspect", "good.safetensors", "--modules", "--json").stdout
    monkeypatch.setattr(sys, "byteorder", "big")
    assert succeed("inspect", "good.safetensors", "--modules", "--json").stdout == inspected
    for verb in ("resize", "merge", "bake", "convert", "subtract"):
        ended = run(*(part.replace("{x}", "good.safetensors") for part in VERBS[verb]))
        assert ended.exit_code == USAGE
        assert "big-endian" in ended.stderr
    assert not (tmp_path / OUT).exists()
