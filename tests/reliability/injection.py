"""Faults at every system call of every verb that writes.

A run without a fault numbers the calls; then the command runs once for each number, with an
error, a signal or a shortened file there. Both outputs that exist and outputs that do not are
covered: a job's folder holds old outputs, which ``--force`` replaces.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reliability.cases import OUT, VERBS
from reliability.lab import (
    BAD_INPUT,
    ERROR,
    INTERRUPTED,
    OK,
    OUTPUT,
    SIGNAL,
    TRUNCATE,
    Ended,
    Fault,
    Server,
    Setting,
    Snapshot,
    watched,
)
from reliability.tensors import METADATA, checkpoint, companions, good, numbers, stored

#: What a full disk, a broken one, a quota, a permission, a signal and an old mount answer.
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EINTR, errno.ENOSYS)

OLD = b"what was there before"


@dataclass(frozen=True, slots=True)
class Job:
    """A command that writes.

    Attributes
    ----------
    outputs
        What it writes; the old ones are made by ``prepare``.
    """

    name: str
    argv: tuple[str, ...]
    outputs: tuple[str, ...] = (OUT,)
    prepare: Callable[[Path], None] = lambda folder: None

    @property
    def is_single(self) -> bool:
        """Whether it writes one file."""
        return self.outputs == (OUT,)

    def arrange(self, folder: Path) -> None:
        """Inputs and old outputs."""
        companions(folder)
        self.prepare(folder)


def _old_file(folder: Path) -> None:
    (folder / OUT).write_bytes(OLD)


def _large_tensor(folder: Path) -> None:
    """A checkpoint with a tensor that no adapter changes, large enough to be copied by the system."""
    _old_file(folder)
    state = {**checkpoint(), "first_stage_model.large": numbers(600, 600, seed=14)}
    (folder / "base.safetensors").write_bytes(stored(state, None))


def _old_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "adapter_model.safetensors").write_bytes(stored(good()))
    (folder / "out" / "adapter_config.json").write_text("{}")


def _unet_alone(folder: Path) -> None:
    """PEFT folders are for one model."""
    state = {name: t for name, t in good().items() if name.startswith("lora_unet")}
    (folder / "x.safetensors").write_bytes(stored(state))
    _old_folder(folder)


def _old_shards(folder: Path) -> None:
    (folder / "out-00001-of-00001.safetensors").write_bytes(stored(checkpoint(), None))
    names = ",".join(f'"{name}":"out-00001-of-00001.safetensors"' for name in checkpoint())
    (folder / "out.safetensors.index.json").write_text('{"metadata":{},"weight_map":{' + names + "}}")


def _pipeline(folder: Path) -> None:
    """A diffusers folder, and an older one where the output goes."""
    weights = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": numbers(
            16, 16, seed=11, scale=1.0
        )
    }
    for name in ("model", "out"):
        (folder / name / "unet").mkdir(parents=True)
        (folder / name / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        (folder / name / "unet" / "config.json").write_text("{}")
        (folder / name / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(stored(weights, None))


def _dylora(folder: Path) -> None:
    metadata = {**METADATA, "ss_network_module": "networks.dylora"}
    (folder / "x.safetensors").write_bytes(stored(good(), metadata))
    (folder / "slices").mkdir()
    (folder / "slices" / "x-r2.safetensors").write_bytes(OLD)


def _single(verb: str) -> Job:
    argv = tuple(part.replace("{x}", "good.safetensors") for part in VERBS[verb])
    return Job(verb, (*argv, "--force"), prepare=_old_file)


_SHARDS = tuple(
    [f"out-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    + ["out-00001-of-00001.safetensors", "out.safetensors.index.json"]
)

JOBS: tuple[Job, ...] = (
    *(_single(verb) for verb in ("edit", "resize", "merge", "fold", "bake", "convert", "subtract")),
    Job("bake-verified", ("bake", "base.safetensors", "good.safetensors", "--verify", "--force", "-o", OUT),
        prepare=_old_file),
    Job("bake-large", ("bake", "base.safetensors", "good.safetensors", "--force", "-o", OUT), prepare=_large_tensor),
    Job("edit-in-place", ("inspect", "good.safetensors", "--set", "note=x", "--in-place"), ("good.safetensors",)),
    Job("new-file", ("merge", "good.safetensors", "good.safetensors", "-o", "new.safetensors"), ("new.safetensors",)),
    Job("shards", ("bake", "base.safetensors", "good.safetensors", "--shard-size", "1KB", "--force", "-o",
                   "out.safetensors.index.json"), _SHARDS, _old_shards),
    Job("peft-folder", ("convert", "x.safetensors", "--to", "peft", "--arch", "sd1", "--force", "-o", "out"), ("out",),
        _unet_alone),
    Job("diffusers-folder", ("bake", "model", "good.safetensors", "--force", "-o", "out"), ("out",), _pipeline),
    Job("slices", ("resize", "x.safetensors", "--split", "--unit", "2", "--force", "-o", "slices"), ("slices",), _dylora),
)  # fmt: skip

#: Those whose files fit into a disk of a few pages.
SMALL_JOBS = tuple(job for job in JOBS if job.name != "bake-large")

JOBS_BY_NAME = {job.name: job for job in JOBS}


class Struck:
    """A job and the calls it makes.

    Raises
    ------
    AssertionError
        If the command does not succeed without a fault.
    """

    def __init__(self, server: Server, job: Job, folder: Path) -> None:
        self.server, self.job, self._folder = server, job, folder
        self._count = 0
        ended, _, after = self.run(Fault())
        assert ended.code == OK, ended.text
        self.calls = ended.trace
        self.finished = after

    def run(self, fault: Fault, *, again: bool = False) -> tuple[Ended, Snapshot, Snapshot]:
        """Run with a fault in a fresh folder; the folder before and after.

        With ``again``, the command is run once more in the same folder, and must succeed.
        """
        self._count += 1
        place = self._folder / f"{self.job.name}-{self._count}"
        place.mkdir(parents=True)
        self.job.arrange(place)
        before = Snapshot.of(place)
        self._watched = watched(place)
        ended = self.server.run(place, self.job.argv, Setting(fault=fault))
        after = Snapshot.of(place)
        if again:
            second = self.server.run(place, self.job.argv, Setting())
            assert second.code == OK or (second.code == OUTPUT and b"exists" in second.stderr), second.text
            assert self.outputs(Snapshot.of(place)) == self.outputs(self.finished), second.text
        return ended, before, after

    def check(self, ended: Ended) -> None:
        """The invariants of the last run."""
        self._watched.check(ended, outputs=self.job.outputs)

    def outputs(self, snapshot: Snapshot) -> dict[str, object]:
        """What a snapshot has of the job's outputs: contents alone."""
        return {
            name: entry[-1] if entry[0] == "file" else entry
            for name, entry in snapshot.entries.items()
            if any(name == output or name.startswith(f"{output}/") for output in self.job.outputs)
            and ".lycotool-" not in name
        }

    def is_whole(self, snapshot: Snapshot, *others: Snapshot) -> bool:
        """Whether the outputs are as in one of the other snapshots, or all new."""
        return self.outputs(snapshot) in [self.outputs(other) for other in (*others, self.finished)]

    def points(self, *, reading: bool) -> list[int]:
        """The numbers of the calls that read, or of those that do not."""
        return [n for n, call in enumerate(self.calls, 1) if (call in READING) is reading]

    def read_points(self) -> list[int]:
        """Calls that read an input, or copy from it."""
        return [n for n, call in enumerate(self.calls, 1) if call in ("read", "copy", "sendfile")]

    def some(self, points: Sequence[int], every: int) -> list[int]:
        """A share of them: verbs that write one file do so by the same steps, and take turns."""
        if not self.job.is_single:
            return list(points[:: max(1, every // 2)])
        turn = [job.name for job in JOBS if job.is_single].index(self.job.name)
        return list(points[turn % (2 * every) :: 2 * every])


#: Calls on inputs.
READING = frozenset({"open to read", "read", "close what was read"})


def strike_errors(struck: Struck, faults: Sequence[tuple[int, int]]) -> Iterator[Ended]:
    """An error at a call: the output is as before, or whole after an interrupted call.

    Raises
    ------
    AssertionError
        If anything else is left behind.
    """
    for nth, number in faults:
        call = struck.calls[nth - 1]
        ended, before, after = struck.run(Fault(nth, ERROR, number))
        told = f"{struck.job.name}: {errno.errorcode[number]} at call {nth}, {call}: {ended.text}"
        allowed = {OK, OUTPUT, BAD_INPUT}
        assert ended.code in allowed, told
        if ended.code == OK:
            assert struck.outputs(after) == struck.outputs(struck.finished), told
            struck.check(ended)
        elif b"was written" in ended.stderr:  # what comes after the name
            assert struck.outputs(after) == struck.outputs(struck.finished), told
        else:
            assert after == before, told
            struck.check(ended)
            assert os.strerror(number).lower().encode() in ended.stderr.lower(), told
        yield ended


def strike_signals(struck: Struck, points: Sequence[int], number: int) -> Iterator[Ended]:
    """A signal at a call: the output is as before, or whole."""
    for nth in points:
        ended, before, after = struck.run(Fault(nth, SIGNAL, number))
        told = f"{struck.job.name}: signal {number} at call {nth}, {struck.calls[nth - 1]}: {ended.text}"
        assert ended.code in (OK, INTERRUPTED), told
        if ended.code == INTERRUPTED and struck.outputs(after) != struck.outputs(struck.finished):
            assert after == before, told
        assert not _litter(after), told
        assert b"Traceback" not in ended.stderr, told
        yield ended


def strike_kills(struck: Struck, points: Sequence[int]) -> Iterator[bool]:
    """SIGKILL at a call: never half an output; the next run succeeds. Yields whether it left litter."""
    for nth in points:
        ended, before, after = struck.run(Fault(nth, SIGNAL, signal.SIGKILL), again=True)
        told = f"{struck.job.name}: SIGKILL at call {nth}, {struck.calls[nth - 1]}: {ended.text}"
        assert ended.code == -signal.SIGKILL, told
        if struck.job.name in ("shards", "slices"):
            # Several files have no common instant: each is old, new, or absent for now.
            states = [struck.outputs(one) for one in (before, struck.finished)]
            files = struck.outputs(after).items()
            is_whole = all(entry in (states[0].get(name), states[1].get(name)) for name, entry in files)
            if struck.job.name == "shards" and "out.safetensors.index.json" in after.entries:
                is_whole = struck.is_whole(after, before)  # an index finds nothing but what it is for
        else:
            is_whole = struck.is_whole(after, before)
        assert is_whole, told
        inputs = set(struck.job.outputs) | _litter(after)
        assert after.without(inputs) == before.without(set(struck.job.outputs)), told
        yield bool(_litter(after))


def strike_truncations(struck: Struck, points: Sequence[int]) -> Iterator[Ended]:
    """An input cut short at a read: a plain error, never a signal."""
    for nth in points:
        ended, before, after = struck.run(Fault(nth, TRUNCATE, 0))
        told = f"{struck.job.name}: cut at call {nth}, {struck.calls[nth - 1]}: {ended.text}"
        assert ended.code in (OK, BAD_INPUT), told
        if ended.code == BAD_INPUT:
            assert struck.outputs(after) == struck.outputs(before) or "edit" in struck.job.name, told
            assert any(
                word in ended.stderr for word in (b"changed while", b"truncated", b"JSON", b"empty")
            ), told
        assert not _litter(after), told
        yield ended


def _litter(snapshot: Snapshot) -> set[str]:
    """Temporary files and folders; hidden, and named so that they are known."""
    return {name for name in snapshot.entries if ".lycotool-" in name}


def large(folder: Path, megabytes: int) -> None:
    """A checkpoint of some size and an adapter for it."""
    layers = {f"unet.l{i}.weight": torch.zeros(1024, 1024) for i in range(megabytes // 4)}
    (folder / "large.safetensors").write_bytes(stored(layers, None))
    adapter = {}
    for i in range(megabytes // 4):
        adapter[f"lora_unet_l{i}.lora_down.weight"] = numbers(1, 1024, seed=i)
        adapter[f"lora_unet_l{i}.lora_up.weight"] = numbers(1024, 1, seed=i)
    (folder / "thin.safetensors").write_bytes(stored(adapter))
