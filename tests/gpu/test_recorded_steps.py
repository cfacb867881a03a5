"""Steps recorded as CUDA graphs give the numbers of steps that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import read, succeed
from makers.bases import Family
from training.runs import base_file, write_pictures

pytestmark = pytest.mark.gpu

SMALL = ("--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8, "--batch-size", 2)
#: Every shape of a batch is recorded at its third step.
STEPS = 12


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")


def train(base: Path, name: str, *options: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and the file."""
    log = Path(f"{name}.jsonl")
    result = succeed(
        "train", base, "images", *SMALL, "--device", "cuda", "--log", log, "--log-every", 1, "--steps", STEPS,
        "-o", f"{name}.safetensors", *options,
    )  # fmt: skip
    assert "not recorded" not in result.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], read(Path(f"{name}.safetensors"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--precision", "fp32"),
        ("--precision", "fp16"),
        ("--no-train-te",),
        ("--gradient-checkpointing",),
        ("--gradient-accumulation-steps", 2),
        ("--dropout", 0.1, "--rank-dropout", 0.1, "--module-dropout", 0.1),
        ("--optimizer", "lion"),
        ("--min-snr-gamma", 5, "--noise-offset", 0.1, "--multires-noise-iterations", 3),
        *(("--algo", algo) for algo in ("loha", "lokr", "ia3", "dylora", "full", "glora", "diag-oft", "boft")),
        ("--network-arg", "dora_wd=true"),
        ("--algo", "full", "--train-norm"),
    ],
    ids=lambda options: " ".join(map(str, options)) or "defaults",
)
def test_recorded_or_not(family: Family, options: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, where kernels sum in a fixed order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        base = base_file(family)
        losses, tensors = train(base, "recorded", *options)
        expected, plain = train(base, "plain", "--no-cuda-graphs", *options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(losses) == STEPS
    assert losses == expected
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.items())
