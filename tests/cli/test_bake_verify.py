"""``--verify``: what it reports, and that it finds what is wrong before the output has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DATA, checkpoint, lora, read, run, succeed, write

from lycotool.io.header import read_header
from lycotool.io.writer import Written
from lycotool.ops._bake_tensors import Source
from lycotool.ops._bake_verify import Verifier

BASE = DATA / "base.safetensors"
CHANGED, COPIED = "model.diffusion_model.down.a.weight", "first_stage_model.untouched.weight"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["keep", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("command", ["bake", "merge"])
def test_errors_are_those_against_float64(command: str, dtype: str) -> None:
    torch.manual_seed(0)
    before, adapter = checkpoint(), lora(alpha=2.0)
    write(Path("model.safetensors"), before)
    write(Path("a.safetensors"), adapter)
    options = ("--dtype", dtype, "--verify", "--json", "-o", "out.safetensors")
    report = json.loads(succeed(command, "model.safetensors", "a.safetensors:0.7", *options).stdout)[
        "verified"
    ]

    up, down = (adapter[f"lora_unet_down_a.lora_{side}.weight"].double() for side in ("up", "down"))
    after = read(Path("out.safetensors"))
    exact = {
        key: tensor.double() + (0.7 * up @ down if key == CHANGED else 0) for key, tensor in before.items()
    }
    cast = list(before) if dtype in ("fp16", "bf16") else [CHANGED]
    errors = torch.cat([(after[key].double() - exact[key]).abs().flatten() for key in cast])
    assert report["max_error"] == pytest.approx(float(errors.max()), rel=1e-9)
    assert report["mean_error"] == pytest.approx(float(errors.mean()), rel=1e-9)
    assert (report["changed"], report["copied"]) == (len(cast), len(before) - len(cast))


@pytest.mark.parametrize("dtype", ["keep", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("adapter", ["lora.safetensors", "loha.safetensors:-1.5", "peft_lora:0.3"])
def test_what_is_right_passes(adapter: str, dtype: str) -> None:
    result = succeed("bake", BASE, DATA / adapter, "--dtype", dtype, "--verify", "-o", "out.safetensors")
    assert "verified: " in result.stderr


def flipped(monkeypatch: pytest.MonkeyPatch, key: str, byte: int, bit: int) -> None:
    """Have one bit of a tensor's data change on disk after it was written."""
    real = Verifier.check

    def check(self: Verifier, written: Written, keys: dict[str, str]) -> None:
        name = {key: name for name, key in keys.items()}.get(key)
        if name is not None:
            with written.path.open("r+b", buffering=0) as file:
                header = read_header(file, written.plan.nbytes, written.path)
                place = header.data_start + header.tensors[name].start + byte
                file.seek(place)
                value = file.read(1)[0]
                file.seek(place)
                file.write(bytes([value ^ (1 << bit)]))
        real(self, written, keys)

    monkeypatch.setattr(Verifier, "check", check)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("key", [CHANGED, COPIED])
@pytest.mark.parametrize("output", ["out.safetensors", "out.safetensors.index.json", "-"])
def test_one_bit_on_disk_is_found(
    output: str, key: str, bit: int, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(in_folder / "model.safetensors", checkpoint())
    write(in_folder / "a.safetensors", lora())
    flipped(monkeypatch, key, 5, bit)
    result = run("bake", "model.safetensors", "a.safetensors", "--verify", "-o", output)
    assert result.exit_code == 10
    assert key in result.stderr
    assert result.stdout == ""
    assert {path.name for path in in_folder.iterdir()} == {"model.safetensors", "a.safetensors"}


def test_one_bit_in_a_folder_is_found(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_folder / "pipe/unet").mkdir(parents=True)
    write(in_folder / "pipe/unet/diffusion_pytorch_model.safetensors", {"down.a.weight": torch.randn(6, 5)})
    write(in_folder / "a.safetensors", lora())
    flipped(monkeypatch, "unet.down.a.weight", 0, 0)
    result = run("bake", "pipe", "a.safetensors", "--verify", "-o", "out")
    assert result.exit_code == 10
    assert {path.name for path in in_folder.iterdir()} == {"pipe", "a.safetensors"}


@pytest.mark.parametrize(
    ("dtype", "error"), [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 5e-2), ("fp8_e4m3fn", 1.0)]
)
def test_a_wrong_value_is_found(
    dtype: str, error: float, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes on disk are those computed, but the computation was wrong."""
    real = Source.compute

    def compute(self: Source, key: str, *arguments: Any, **named: Any) -> torch.Tensor:
        found = real(self, key, *arguments, **named)
        if key == CHANGED and found.dtype == torch.float32:
            found.view(-1)[7] += error
        return found

    write(in_folder / "model.safetensors", checkpoint())
    write(in_folder / "a.safetensors", lora())
    monkeypatch.setattr(Source, "compute", compute)
    result = run(
        "bake", "model.safetensors", "a.safetensors", "--dtype", dtype, "--verify", "-o", "out.safetensors"
    )
    assert result.exit_code == 10
    assert f"{CHANGED}: 1 values are off by up to" in result.stderr
    assert not (in_folder / "out.safetensors").exists()


def test_a_wrong_copy_is_found(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lycotool.ops._bake_tensors import Baker

    real = Baker.produce

    def produce(self: Baker, key: str) -> Any:
        return [memoryview(bytes(12))] if key == COPIED else real(self, key)

    write(in_folder / "model.safetensors", checkpoint())
    write(in_folder / "a.safetensors", lora())
    monkeypatch.setattr(Baker, "produce", produce)
    result = run("bake", "model.safetensors", "a.safetensors", "--verify", "-o", "out.safetensors")
    assert result.exit_code == 10
    assert f"{COPIED}: is not a copy" in result.stderr
