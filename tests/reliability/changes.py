"""Inputs that are overwritten, cut, lengthened or replaced while commands read them.

Nothing is simulated: one process reads while this one changes the file, at moments spread over the
time that the command takes. The file has the same header before and after, so that only the times the
system keeps can tell that numbers of two files were mixed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reliability.cases import OUT
from reliability.lab import BAD_INPUT, CHECK, OK, Ended, Server, Setting
from reliability.tensors import numbers, stored

CHECKPOINT, ADAPTER = "x.safetensors", "y.safetensors"

#: Commands by the input that changes; every command that reads tensors is one of them.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "inspect": ("inspect", CHECKPOINT, "--hashes", "--json"),
    "check": ("inspect", ADAPTER, "--check", "--json"),
    "edit": ("inspect", CHECKPOINT, "--set", "a=b", "-o", OUT),
    "bake": ("bake", CHECKPOINT, "thin.safetensors", "-o", OUT),
    "bake --verify": ("bake", CHECKPOINT, "thin.safetensors", "--verify", "-o", OUT),
    "fold": ("merge", CHECKPOINT, "thin.safetensors", "-o", OUT),
    "extract": ("extract", "base.safetensors", CHECKPOINT, "--rank", "2", "-o", OUT),
    "merge": ("merge", "sound.safetensors", ADAPTER, "-o", OUT),
    "resize": ("resize", ADAPTER, "--rank", "4", "-o", OUT),
    "convert": ("convert", ADAPTER, "--to", "diffusers", "--arch", "sd1", "-o", OUT),
}

#: What a run says of a file that is not as it was, or no longer whole.
_SAID = (b"changed while", b"truncated", b"after the last tensor", b"bytes long", b"too short", b"empty file")

#: Bytes that are written at once: what is opened between two of these is seen to change.
_PIECE = 2**16


def _overwrite(path: Path, new: Path) -> None:
    with path.open("r+b", buffering=0) as file, new.open("rb") as source:
        while piece := source.read(_PIECE):
            file.write(piece)


def _cut(path: Path, new: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _lengthen(path: Path, new: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _replace(path: Path, new: Path) -> None:
    shutil.copyfile(new, path.with_name("copy"))
    path.with_name("copy").replace(path)


CHANGES: Mapping[str, Callable[[Path, Path], None]] = {
    "overwritten": _overwrite,
    "cut": _cut,
    "lengthened": _lengthen,
    "replaced": _replace,
}


@dataclass
class Outcome:
    """How the rounds of a command ended, by change: with what the old file gives, the new one, or refused."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = {kind: {} for kind, _ in self.ends}
        for (kind, end), count in sorted(self.ends.items()):
            kinds[kind][end] = count
        return "; ".join(
            f"{kind}: " + ", ".join(f"{count} {end}" for end, count in ends.items())
            for kind, ends in kinds.items()
        )


def changed_while_read(server: Server, folder: Path, command: str, rounds: int) -> Outcome:
    """Run a command so often, with a change of its input each time.

    Raises
    ------
    AssertionError
        If one ended by a signal, hung, gave a traceback, or wrote what neither file gives.
    """
    argv = COMMANDS[command]
    changed = folder / (CHECKPOINT if CHECKPOINT in argv else ADAPTER)
    kept = {age: folder.parent / f"{age}-{changed.name}" for age in ("old", "new")}
    for seed, path in enumerate(kept.values()):
        inputs(folder, seed)
        shutil.copyfile(changed, path)
    known = {}
    for age in ("new", "old"):
        shutil.copyfile(kept[age], changed)
        ended, result = _result(server, folder, argv)
        assert ended.code in (OK, CHECK), ended.text
        known[result] = age
    names = set(folder.iterdir())
    outcome = Outcome()
    for number in range(rounds):
        kind = list(CHANGES)[number % len(CHANGES)]
        shutil.copyfile(kept["old"], changed)
        delay = ended.seconds * (number + 0.5) / rounds
        changing = threading.Thread(
            target=lambda wait=delay, kind=kind: (time.sleep(wait), CHANGES[kind](changed, kept["new"]))
        )
        changing.start()
        struck, result = _result(server, folder, argv)
        changing.join()
        told = f"{command}, {kind} after {delay:.3f} s: {struck.text}"
        assert not struck.is_late, told
        assert struck.code in (OK, CHECK, BAD_INPUT), told
        assert b"Traceback" not in struck.stderr, told
        assert set(folder.iterdir()) == names, told
        if struck.code == BAD_INPUT:
            assert any(words in struck.stderr for words in _SAID), told
            outcome.ends[kind, "refused"] += 1
        else:
            assert result in known, f"a mixture: {told}"
            outcome.ends[kind, known[result]] += 1
    return outcome


def _result(server: Server, folder: Path, argv: tuple[str, ...]) -> tuple[Ended, str]:
    """How a run ended, and a digest of all that it gave."""
    ended = server.run(folder, argv, Setting(timeout=300))
    out = folder / OUT
    digest = hashlib.sha256(b"%d" % ended.code + ended.stdout)
    if out.exists():
        digest.update(out.read_bytes())
        out.unlink()
    return ended, digest.hexdigest()


def inputs(folder: Path, seed: int, *, layers: int = 12, width: int = 1024) -> None:
    """A checkpoint of so many layers, adapters for it, and a large adapter of other numbers for each seed."""
    names = [
        f"down_blocks_{block}_attentions_{n}_transformer_blocks_0_attn{k}_to_q"
        for block in range(3)
        for n in range(2)
        for k in (1, 2)
    ][:layers]

    def adapter(rank: int, seed: int) -> bytes:
        state = {}
        for n, name in enumerate(names):
            state[f"lora_unet_{name}.lora_down.weight"] = numbers(rank, width, seed=seed + 2 * n)
            state[f"lora_unet_{name}.lora_up.weight"] = numbers(width, rank, seed=seed + 2 * n + 1)
            state[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank))
        return stored(state)

    def checkpoint(seed: int) -> bytes:
        return stored(
            {f"unet.{name}.weight": numbers(width, width, seed=seed + n) for n, name in enumerate(names)},
            None,
        )

    (folder / CHECKPOINT).write_bytes(checkpoint(100 * seed + 7))
    (folder / ADAPTER).write_bytes(adapter(128, 100 * seed + 11))
    if not (folder / "base.safetensors").exists():
        (folder / "base.safetensors").write_bytes(checkpoint(5000))
        (folder / "thin.safetensors").write_bytes(adapter(1, 6000))
        (folder / "sound.safetensors").write_bytes(adapter(8, 7000))
