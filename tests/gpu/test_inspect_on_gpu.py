"""`inspect --stats` and `--compare` measure on a GPU what they measure on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, lora, succeed, write

pytestmark = pytest.mark.gpu

#: Factors are multiplied in float32 on either device; what follows is in float64.
TOLERANCE = 2e-5


def on_both(*arguments: object) -> tuple[dict, dict]:
    found = [
        json.loads(succeed("inspect", *arguments, "--device", device, "--json").stdout)["files"][0]
        for device in ("cpu", "cuda")
    ]
    return found[0], found[1]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every way singular values are computed: factors, a core, a Kronecker product, dense, a base."""
    tensors = {
        **lora(out=64, width=48, rank=8),
        **lora("lora_unet_wide", out=6, width=5, rank=9),
        "lora_unet_kron.lokr_w1": torch.randn(4, 4),
        "lora_unet_kron.lokr_w2_a": torch.randn(16, 3),
        "lora_unet_kron.lokr_w2_b": torch.randn(3, 16),
        "lora_unet_full.diff": torch.randn(40, 30, 3, 3),
        "lora_unet_ia3.weight": torch.randn(5),
        "lora_unet_ia3.on_input": torch.tensor(1),
        "lora_unet_core.lora_up.weight": torch.randn(32, 4, 1, 1),
        "lora_unet_core.lora_mid.weight": torch.randn(4, 4, 3, 3),
        "lora_unet_core.lora_down.weight": torch.randn(4, 32, 1, 1),
    }
    return write(tmp_path / "mixed.safetensors", tensors)


def test_statistics(mixed: Path, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"model.diffusion_model.ia3.weight": torch.randn(6, 5)})
    for file in (mixed, DATA / "lora.safetensors", DATA / "loha.safetensors"):
        one, two = on_both(file, "--stats", "--base", base)
        assert one["stats"]["unmeasured"] == two["stats"]["unmeasured"] == {}
        for a, b in zip(one["stats"]["modules"], two["stats"]["modules"], strict=True):
            for key in ("fro", "spectral", "rms", "stable_rank", "largest"):
                assert a[key] == pytest.approx(b[key], rel=TOLERANCE), (a["name"], key)
            assert a["effective_rank"] == pytest.approx(b["effective_rank"], rel=1e-3)


def test_comparison(mixed: Path) -> None:
    pairs = ((mixed, mixed), (DATA / "lora.safetensors", DATA / "loha.safetensors"))
    for first, second in pairs:
        one, two = on_both(first, "--compare", second)
        assert one["comparison"]["compared"] == two["comparison"]["compared"] > 0
        for a, b in zip(one["comparison"]["layers"], two["comparison"]["layers"], strict=True):
            for key in ("cosine", "interference", "overlap_out", "overlap_in", "norm_ratio"):
                assert a[key] == pytest.approx(b[key], abs=1e-3), (a["name"], key)
