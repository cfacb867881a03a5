"""The golden vectors on a GPU: the tolerances are those of the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, read, succeed
from test_golden import CASES, OTHER_READING, bake_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_case(case: dict[str, object], tmp_path: Path) -> None:
    contested = OTHER_READING.get(str(case["case"]), {"default": "expected"})
    bake_case(tmp_path, case, ("--device", "cuda"), str(contested["default"]))


@pytest.mark.parametrize("adapter", ["loha", "lora"])
def test_sample_is_the_same_on_both(adapter: str, tmp_path: Path) -> None:
    files = {}
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.safetensors"
        succeed("bake", DATA / "base.safetensors", DATA / f"{adapter}.safetensors",
                "-o", output, "--device", device, "--dtype", "fp32")  # fmt: skip
        files[device] = read(output)
    for key, cpu in files["cpu"].items():
        # Sums over the rank in another order: a few eps(float32) of the largest value.
        limit = 8 * torch.finfo(torch.float32).eps * max(1.0, float(cpu.abs().max()))
        assert (files["cuda"][key].double() - cpu.double()).abs().max() <= limit


def test_auto_takes_the_gpu(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    result = succeed(
        "bake",
        DATA / "base.safetensors",
        DATA / "lora.safetensors",
        "-o",
        tmp_path / "x.safetensors",
        "--json",
    )
    assert json.loads(result.stdout)["changed"] == 354
    assert torch.cuda.max_memory_allocated() > 0
