"""Seconds from the start of the program until it says what is wrong, with inputs of many gigabytes.

Every run is a fresh process, as a user starts it: nothing is imported yet. The checkpoints are sparse,
and as large as is asked for; nobody should look at their tensors before the error.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reliability.cases import OUT
from reliability.lab import BAD_INPUT, OUTPUT
from reliability.sizes import MIB, adapter_for, sparse_checkpoint

#: MiB of each layer of the checkpoints.
_LAYER = 64

#: What commands are given, and how they name their output.
COMMANDS = {
    "inspect --check": ("inspect", "{x}", "--check"),
    "inspect --set": ("inspect", "{x}", "--set", "a=b", "-o"),
    "bake": ("bake", "{x}", "thin.safetensors", "-o"),
    "bake --verify": ("bake", "{x}", "thin.safetensors", "--verify", "-o"),
    "merge into a checkpoint": ("merge", "{x}", "thin.safetensors", "-o"),
    "merge": ("merge", "thin.safetensors", "{x}", "-o"),
    "resize": ("resize", "{x}", "--rank", "4", "-o"),
    "convert": ("convert", "{x}", "--to", "diffusers", "--arch", "sd1", "-o"),
    "train": ("train", "{x}", "data", "-o"),
    "extract": ("extract", "tuned.safetensors", "{x}", "--rank", "4", "-o"),
}

#: Commands that work on adapters; where the output is wrong they are given one.
_OF_ADAPTERS = ("merge", "resize", "convert")


@dataclass(frozen=True, slots=True)
class Refusal:
    """One run that was to end before any tensor was read."""

    command: str
    fault: str
    code: int
    seconds: float
    message: str


def refusals(folder: Path, gigabytes: float, *, repeats: int = 1) -> Iterator[Refusal]:
    """Every command with each fault it can have; the longest of ``repeats`` runs.

    Raises
    ------
    AssertionError
        If a run ends otherwise than by the error, or leaves anything behind.
    """
    faults = _inputs(folder, int(1024 * gigabytes))
    names = set(folder.iterdir())
    for command, argv in COMMANDS.items():
        writes = argv[-1] == "-o"
        for fault, name in faults.items():
            if name is not None:  # a bad input; a good place
                given, code, output = name, BAD_INPUT, OUT
            elif writes:
                given = "thin.safetensors" if command in _OF_ADAPTERS else "large.safetensors"
                code, output = (
                    OUTPUT,
                    "nowhere/out.safetensors" if fault == "no folder" else "taken.safetensors",
                )
            else:
                continue
            arguments = [given if part == "{x}" else part for part in argv] + [output] * writes
            yield max(
                (_run(folder, command, fault, arguments, code) for _ in range(repeats)),
                key=lambda one: one.seconds,
            )
            assert set(folder.iterdir()) == names, (command, fault)


def _run(folder: Path, command: str, fault: str, arguments: list[str], code: int) -> Refusal:
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "lycotool", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    assert ended.returncode == code, (command, fault, ended.returncode, ended.stderr)
    return Refusal(command, fault, code, seconds, ended.stderr.splitlines()[0])


def _inputs(folder: Path, megabytes: int) -> dict[str, str | None]:
    """Sound and damaged files; each fault's name, and the input that has it unless it is the output's."""
    width = int((_LAYER * MIB // 4) ** 0.5)
    for seed, name in enumerate(("large", "tuned"), 1):
        sparse_checkpoint(folder / f"{name}.safetensors", max(1, megabytes // _LAYER), width, seed=seed)
    adapter_for(folder / "thin.safetensors", width)
    (folder / "data").mkdir()
    (folder / "taken.safetensors").write_bytes(b"what was there before")
    large = folder / "large.safetensors"
    with large.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    nbytes = large.stat().st_size - 8 - length
    last = header[list(header)[-1]]
    _sparse(folder / "cut.safetensors", _text(header), nbytes - 1)
    _sparse(folder / "longer.safetensors", _text(header), nbytes + 1)
    last["shape"] = [width, width + 1]
    _sparse(folder / "shape.safetensors", _text(header), nbytes)
    last["shape"], last["dtype"] = [width, width], "F128"
    _sparse(folder / "dtype.safetensors", _text(header), nbytes)
    _sparse(folder / "header.safetensors", b"{" * length, nbytes)
    return {
        "cut short": "cut.safetensors",
        "a byte too long": "longer.safetensors",
        "a shape that does not fit": "shape.safetensors",
        "an unknown dtype": "dtype.safetensors",
        "no JSON": "header.safetensors",
        "no folder": None,
        "output exists": None,
    }


def _text(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _sparse(path: Path, text: bytes, nbytes: int) -> None:
    """A file with this header and so many bytes of data, which are a hole."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + nbytes)
