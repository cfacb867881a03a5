"""What is chosen from the memory that a run takes and the memory there is, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import run, succeed
from training.runs import SIDE, InMemory, base_file, write_pictures

from lycotool.errors import ResourceError
from lycotool.training import loop
from lycotool.training.memory import choice as module
from lycotool.training.memory.available import available_memory
from lycotool.training.memory.choice import FRAGMENTATION, choose_memory, fits, remedies
from lycotool.training.memory.estimate import MemoryEstimate
from lycotool.training.memory.exhausted import explained
from lycotool.training.setup import Trainable

SMALL = ("--resolution", SIDE, "--min-bucket-reso", SIDE, "--bucket-reso-steps", 8, "--batch-size", 2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> dict[bool, int]:
    """Totals with and without checkpointing, in place of the real ones."""
    totals = {False: 1000, True: 400}

    def estimate(ready: Trainable, *, checkpoint: bool) -> MemoryEstimate:
        return MemoryEstimate(0, 0, 0, 0, 0, 0, 0, 0, totals[checkpoint], checkpoint)

    monkeypatch.setattr(module, "estimate_memory", estimate)
    return totals


@pytest.fixture
def open_run(pictures: Path) -> Iterator[Trainable]:
    with InMemory(pictures, train_te=False) as made:
        yield made.ready


@pytest.mark.parametrize(
    ("available", "is_on", "warns"), [(1060, False, False), (1059, True, False), (424, True, False), (423, True, True)]
)  # fmt: skip
@pytest.mark.usefixtures("estimates")
def test_checkpointing_follows_the_memory(
    open_run: Trainable, available: int, is_on: bool, warns: bool
) -> None:
    """1000 and 400 bytes, and 6 % between them."""
    assert FRAGMENTATION == 1.06
    chosen = choose_memory(open_run, available=available)
    assert chosen.ready.options.compute.gradient_checkpointing is is_on
    assert chosen.estimate.gradient_checkpointing is is_on
    assert f"gradient checkpointing is {'on' if is_on else 'off'}: without it" in chosen.reason
    assert bool(chosen.warning) == warns
    if warns:
        assert "--base-dtype fp8" in chosen.warning
        assert "--gradient-checkpointing" not in chosen.warning


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.usefixtures("estimates")
def test_what_was_asked_for_is_done(pictures: Path, asked: bool) -> None:
    with InMemory(pictures, train_te=False, gradient_checkpointing=asked) as made:
        for available in (10, 10_000):
            chosen = choose_memory(made.ready, available=available)
            assert chosen.ready.options.compute.gradient_checkpointing is asked
            assert chosen.reason == ""
            assert bool(chosen.warning) == (available == 10)


def test_nothing_is_chosen_where_nobody_knows_the_memory(open_run: Trainable) -> None:
    chosen = choose_memory(open_run)
    assert chosen.available is None
    assert chosen.ready.options.compute.gradient_checkpointing is False
    assert (chosen.reason, chosen.warning) == ("", "")


def test_the_real_estimates_decide(open_run: Trainable) -> None:
    without = choose_memory(open_run).estimate.total
    chosen = choose_memory(open_run, available=int(1.05 * without))
    assert chosen.estimate.gradient_checkpointing
    assert chosen.estimate.total < without
    assert fits(chosen.estimate, int(1.05 * without))


def test_remedies_are_those_not_in_use(pictures: Path) -> None:
    with InMemory(pictures, train_te=False, batch_size=1) as made:
        assert "--batch-size" not in remedies(made.options, checkpointing=False)
        assert "--gradient-checkpointing" in remedies(made.options, checkpointing=False)
    with InMemory(pictures, train_te=False, batch_size=2) as made:
        assert "--batch-size" in remedies(made.options, checkpointing=True)


@pytest.mark.parametrize(
    ("free", "reserved", "fraction", "expected"),
    [(600, 100, 1.0, 700), (600, 100, 0.5, 500), (600, 0, 0.9, 600)],
)
def test_available_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, fraction: float, expected: int
) -> None:
    """What is free, and what this process has for tensors already, up to the fraction it may have."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert available_memory(torch.device("cuda")) == expected
    assert available_memory(torch.device("cpu")) is None


def test_running_out_says_what_was_expected(open_run: Trainable) -> None:
    chosen = choose_memory(open_run, available=2**33)
    with pytest.raises(ResourceError) as raised, explained(open_run.options, chosen):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")
    assert raised.value.message == (
        f"the GPU has no memory left: training was estimated at {chosen.estimate.total / 2**30:.1f} GiB, 8.0 GiB were free"
    )
    assert raised.value.details == ("CUDA out of memory. Tried to allocate 20.00 MiB.",)
    assert raised.value.hint is not None
    for option in ("--gradient-checkpointing", "--batch-size", "--base-dtype fp8"):
        assert option in raised.value.hint


def test_running_out_on_the_command_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop, "train", no_memory)
    output = tmp_path / "a.safetensors"
    result = run("train", base_file("sd1"), pictures, *SMALL, "--device", "cpu", "--steps", 1, "-o", output)
    assert result.exit_code == 8
    assert "the GPU has no memory left" in result.stderr
    assert "`--gradient-checkpointing`, a smaller `--batch-size`" in result.stderr
    assert not output.exists()


def test_a_dry_run_shows_the_parts(pictures: Path) -> None:
    result = succeed(
        "train", base_file("sd1"), pictures, *SMALL, "--device", "cpu", "--dry-run", "--no-train-te"
    )
    lines = result.stderr.splitlines()
    assert any(
        line.startswith("memory while training: ") and "estimated within 10 %" in line for line in lines
    )
    for part in ("frozen weights", "parameters", "gradients", "optimizer", "activations", "cached latents"):
        assert any(line.endswith(f"B {part}") for line in lines), part
    again = succeed(
        "train", base_file("sd1"), pictures, *SMALL, "--device", "cpu", "--dry-run", "--no-train-te", "--json",
        "--gradient-checkpointing",
    )  # fmt: skip
    memory = json.loads(again.stdout)["plan"]["memory"]
    assert memory["gradient_checkpointing"] is True
    assert f"{memory['activations'] / 2**20:.1f} MiB activations, computed again" in again.stderr.replace(
        "  ", " "
    )
