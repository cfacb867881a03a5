"""Training on two GPUs through NCCL is training on one, and fails as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import read
from training.runs import base_file, write_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]

SMALL = ("--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8, "--device", "cuda",
         "--precision", "fp32", "--save-dtype", "fp32", "--optimizer", "sgd", "--lr", 0.1, "--log-every", 1)  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")
    return tmp_path


def trained(gpus: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which starts more; without TF32, whose rounding hides faults."""
    command = [
        sys.executable,
        "-m",
        "lycotool",
        "train",
        base_file("sd1"),
        "images",
        *SMALL,
        "--gpus",
        gpus,
        *arguments,
    ]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0"},
        check=False,
    )


def losses(path: str) -> list[float]:
    events = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ((), ()),
        (("--no-cuda-graphs", "--algo", "lokr", "--factor", 4), ()),
        (("--algo", "full", "--no-train-te", "--lr", 0.01), ()),
        (("--optimizer", "sgdnesterov", "--lr", 0.02), ("--shard-optimizer",)),
    ],
    ids=["lora", "lokr", "full", "sharded"],
)
def test_two_are_one(options: tuple[object, ...], ours: tuple[object, ...]) -> None:
    """Recorded as CUDA graphs and not; kernels for half a batch may sum in another order.

    So gradients differ by some roundings of float32, 1e-6 of them; a batch that is weighed wrongly changes
    them by tenths. What should be zero, a bias before a norm, is noise, of the size of 1e-8 here.
    """
    more = ("--steps", 6, *options)
    alone = trained(1, "--batch-size", 4, *more, "-o", "one.safetensors", "--log-file", "one.jsonl")
    assert alone.returncode == 0, alone.stderr
    done = trained(2, "--batch-size", 2, *more, *ours, "-o", "two.safetensors", "--log-file", "two.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "two.safetensors\n"
    assert "2 processes share each batch of 4 images" in done.stderr
    assert losses("two.jsonl") == pytest.approx(losses("one.jsonl"), rel=1e-4)
    one, two = read(Path("one.safetensors")), read(Path("two.safetensors"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        error = float((two[name] - expected).norm())
        assert error <= 1e-4 * float(expected.norm()) + 1e-6, (name, error, float(expected.norm()))


def test_one_that_fails_ends_both(in_folder: Path) -> None:
    file = in_folder / "images" / "1.png"
    file.write_bytes(file.read_bytes()[:-40])
    done = trained(2, "--batch-size", 2, "--steps", 2, "-o", "a.safetensors")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("lycotool: error: ") == 1
    assert "1.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert "NCCL" not in done.stderr
