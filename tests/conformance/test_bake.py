"""Every stored form folded into a checkpoint and verified: float32 against float64, and copies."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conformance.samples import Case, cases, make
from helpers import succeed, write

BY_HINT = {
    hint: list(group)
    for hint, group in groupby(sorted(cases(), key=lambda case: case.hint or ""), key=lambda case: case.hint)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("hint", BY_HINT, ids=str)
def test_all_of_them_verify(hint: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    chosen: list[Case] = BY_HINT[hint]
    for number, case in enumerate(chosen):
        module = make(case)
        layer = f"model.diffusion_model.m{number}.x"
        checkpoint[f"{layer}.weight"] = module.base.to(dtype)
        checkpoint[f"{layer}.bias"] = torch.ones(module.shape[0]).to(dtype)
        if dtype == torch.float8_e4m3fn and len(module.shape) == 2:
            checkpoint[f"{layer}.weight_scale"] = torch.full((module.shape[0], 1), 0.5)
        adapter |= {f"lora_unet_m{number}_x.{slot}": tensor for slot, tensor in module.tensors.items()}
    base = write(tmp_path / "base.safetensors", checkpoint)
    metadata = {} if hint is None else {"ss_network_args": json.dumps({"algo": hint})}
    source = write(tmp_path / "adapter.safetensors", {k: t.clone() for k, t in adapter.items()}, metadata)

    result = succeed("bake", base, f"{source}:0.7", "--verify", "--json", "-o", tmp_path / "out.safetensors")

    report = json.loads(result.stdout)
    assert report["adapters"][0]["matched"] == len(chosen)
    assert report["verified"]["changed"] >= len(chosen)
