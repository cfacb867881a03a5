"""Memory, time, threads: what a run may take, and that its bytes do not depend on them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reliability.cases import OUT, VERBS, WRITING
from reliability.injection import large
from reliability.lab import OK, RESOURCE, Server, Setting, watched
from reliability.tensors import companions

MIB = 2**20


@pytest.mark.parametrize("verb", ["resize", "merge", "bake", "convert", "subtract"])
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


@pytest.mark.parametrize("verb", ["bake", "fold", "check"])
def test_memory_of_large_files(verb: str, server: Server, tmp_path: Path) -> None:
    """96 MiB in layers of 4 MiB: what is held is some layers, not the file."""
    large(tmp_path, 96)
    argv = {
        "bake": ["bake", "large.safetensors", "thin.safetensors", "-o", OUT],
        "fold": ["merge", "large.safetensors", "thin.safetensors", "-o", OUT],
        "check": ["inspect", "large.safetensors", "--check"],
    }[verb]
    small = tmp_path / "small"
    small.mkdir()
    companions(small)
    idle = server.run(small, ["merge", "base.safetensors", "good.safetensors", "-o", OUT])
    ended = server.run(tmp_path, argv)
    assert ended.code in ((0, 10) if verb == "check" else (0,)), ended.text
    assert ended.peak - idle.peak < 6 * 4 * MIB + 32 * MIB, f"{ended.peak} bytes, idle {idle.peak}"


def _digest(verb: str, folder: Path, **environment: str) -> str:
    argv = [part.replace("{x}", "good.safetensors") for part in VERBS[verb]]
    (folder / OUT).unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, "-m", "lycotool", *argv],
        cwd=folder,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    return hashlib.sha256((folder / OUT).read_bytes()).hexdigest()


@pytest.mark.parametrize("verb", WRITING)
def test_runs_give_the_same_bytes(verb: str, server: Server, tmp_path: Path) -> None:
    """In the fork server and in a process with other hashes of strings."""
    companions(tmp_path)
    ended = server.run(tmp_path, [part.replace("{x}", "good.safetensors") for part in VERBS[verb]])
    assert ended.code == OK, ended.text
    first = hashlib.sha256((tmp_path / OUT).read_bytes()).hexdigest()
    assert _digest(verb, tmp_path, PYTHONHASHSEED="7", OMP_NUM_THREADS="1") == first
