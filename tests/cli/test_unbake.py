"""``bake --unbake``: adapters taken out again, and how exactly that is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, read, run, succeed, write

BASE = DATA / "base.safetensors"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("adapters", [["lora:0.8"], ["loha"], ["lora:0.5:te=0", "loha:-1"]], ids=str)
def test_what_was_baked_is_taken_out_within_the_stated_error(
    adapters: list[str], dtype: str, tmp_path: Path
) -> None:
    names = [
        f"{DATA / one.partition(':')[0]}.safetensors{''.join(one.partition(':')[1:])}" for one in adapters
    ]
    start, baked, out = (tmp_path / f"{name}.safetensors" for name in ("start", "baked", "out"))
    succeed("bake", BASE, f"{names[0].split(':')[0]}:0", "--dtype", dtype, "-o", start)

    succeed("bake", start, *names, "-o", baked)
    result = succeed("bake", baked, *names, "--unbake", "--json", "-o", out)

    error = json.loads(result.stdout)["reconstruction_error"]
    before, after, between = read(start), read(out), read(baked)
    differences = {key: float((after[key].double() - before[key].double()).abs().max()) for key in before}
    assert max(differences.values()) <= error
    # The bound is two roundings of the largest weight: not far from what one may see.
    largest = max(
        float(tensor.float().abs().max()) for tensor in between.values() if tensor.is_floating_point()
    )
    assert (
        0
        < error
        <= 1.01
        * torch.finfo({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).eps
        * largest
    )
    assert any(not torch.equal(between[key], before[key]) for key in before)


def test_the_default_name_and_the_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = succeed("bake", BASE, DATA / "lora.safetensors", "--unbake")

    assert result.stdout == "base-unbaked.safetensors\n"
    assert "of what it was before it was baked" in result.stderr


def test_what_depended_on_the_weights_cannot_be_taken_out(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", checkpoint())
    name = next(key for key, tensor in checkpoint().items() if tensor.ndim == 2).removesuffix(".weight")
    rows = checkpoint()[f"{name}.weight"].shape[0]
    adapter = write(
        tmp_path / "ia3.safetensors",
        {f"{name}.weight": torch.ones(rows), f"{name}.on_input": torch.tensor(0)},
    )

    result = run("bake", base, adapter, "--unbake", "-o", tmp_path / "out.safetensors")

    assert result.exit_code == 5
    assert "depended on it" in result.stderr
    assert f"{name}: ia3" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()
