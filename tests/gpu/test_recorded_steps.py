"""Steps recorded as CUDA graphs give the numbers of steps that are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        "train", base, "images", *SMALL, "--device", "cuda", "--log-file", log, "--log-every", 1, "--steps", STEPS,
        "-o", f"{name}.safetensors", *options,
    )  # fmt: skip
    assert "not recorded" not in result.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], read(Path(f"{name}.safetensors"))


@pytest.fixture
def _in_fixed_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that sum in a fixed order alone."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_in_fixed_order")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--no-train-te",),
        ("--gradient-checkpointing",),
        ("--gradient-accumulation-steps", 2),
        ("--dropout", 0.1, "--rank-dropout", 0.1, "--module-dropout", 0.1),
        ("--optimizer", "lion"),
        ("--min-snr-gamma", 5, "--noise-offset", 0.1, "--multires-noise-iterations", 3),
        *(
            ("--algo", algo)
            for algo in ("loha", "lokr", "ia3", "dylora", "full", "glora", "diag-oft", "boft")
        ),
        ("--network-arg", "dora_wd=true"),
        ("--algo", "full", "--train-norm"),
    ],
    ids=lambda options: " ".join(map(str, options)) or "defaults",
)
def test_recorded_or_not(family: Family, options: tuple[object, ...]) -> None:
    """The same bits."""
    base = base_file(family)
    losses, tensors = train(base, "recorded", "--precision", "fp32", *options)
    expected, plain = train(base, "plain", "--precision", "fp32", "--no-cuda-graphs", *options)
    assert len(losses) == STEPS
    assert losses == expected
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.items())


@pytest.mark.usefixtures("_in_fixed_order")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_recorded_or_not_in_half_precision(family: Family, precision: str) -> None:
    """The same bits of the UNet; a text encoder's are rounded otherwise, by the precision's eps.

    transformers gives attention a mask while a graph is recorded, and with it another kernel.
    """
    base = base_file(family)
    for options, eps in ((("--no-train-te",), 0.0), ((), {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision])):
        losses, _ = train(base, "recorded", "--force", "--precision", precision, *options)
        expected, _ = train(base, "plain", "--force", "--precision", precision, "--no-cuda-graphs", *options)
        assert len(losses) == STEPS
        assert losses == pytest.approx(expected, rel=eps, abs=0)
