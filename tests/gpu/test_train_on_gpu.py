"""``lycotool train`` on a GPU, from files to a file, on micro models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import read, succeed
from makers.bases import Family
from training.runs import base_file, base_folder, write_pictures

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SMALL = ("--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8, "--batch-size", 2)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")
    return tmp_path


def train(base: Path, *options: object, device: str = DEVICE, output: str = "a.safetensors") -> list[float]:
    """Train, and give the loss of every step."""
    log = Path(output).with_suffix(".jsonl")
    logged = ("--log-file", log, "--log-every", 1)
    succeed("train", base, "images", *SMALL, "--device", device, *logged, "-o", output, *options)
    tensors = read(Path(output))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "alpha" not in name)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_are_those_of_the_cpu(family: Family, precision: str) -> None:
    """All draws are made on the CPU, so only rounding may differ."""
    base = base_file(family)
    expected = train(base, "--steps", 3, "--precision", "fp32", device="cpu", output="cpu.safetensors")
    found = train(base, "--steps", 3, "--precision", precision)
    assert len(found) == len(expected) == 3
    # Sixty layers in a row, each rounding to the precision's eps, some of it averaged out.
    tolerance = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}[precision]
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "algo", ["lora", "loha", "lokr", "ia3", "dylora", "full", "glora", "diag-oft", "boft"]
)
def test_every_algorithm(algo: str) -> None:
    train(base_folder("sd1"), "--steps", 3, "--algo", algo)


@pytest.mark.parametrize(
    "options",
    [
        ("--gradient-checkpointing",),
        ("--validation-split", 0.5, "--validate-every-n-steps", 1),
        ("--cache-latents", "disk"),
        ("--no-train-te",),
        ("--optimizer", "prodigy"),
        ("--optimizer", "adafactor"),
        ("--min-snr-gamma", 5, "--noise-offset", 0.1, "--multires-noise-iterations", 3),
        ("--dropout", 0.1, "--rank-dropout", 0.1, "--module-dropout", 0.1),
        ("--scale-weight-norms", 1.0, "--gradient-accumulation-steps", 2),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_options(options: tuple[object, ...]) -> None:
    train(base_file("sd1"), "--steps", 2, *options)


def test_sample_images(in_folder: Path) -> None:
    (in_folder / "prompts.txt").write_text("a red disk --w 16 --h 16 --s 2\n")
    train(base_file("sd1"), "--steps", 2, "--sample-prompts", "prompts.txt", "--sample-every-n-steps", 1)
    assert list(in_folder.glob("*-samples/*.png"))


def test_a_resumed_run_is_the_whole_run() -> None:
    base = base_file("sd1")
    train(base, "--steps", 4, output="whole.safetensors")
    train(base, "--steps", 2, "--save-state-on-train-end", output="parts.safetensors")
    train(base, "--steps", 4, "--force", output="parts.safetensors")
    whole, parts = read(Path("whole.safetensors")), read(Path("parts.safetensors"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-6)
