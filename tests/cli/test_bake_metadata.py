"""The metadata of a baked checkpoint: what stays, what is no longer true, and what it came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoint, lora, succeed, write
from safetensors import safe_open

LDM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(Path("a.safetensors"), lora())
    write(Path("b.safetensors"), lora())
    return tmp_path


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def data_hash(path: str) -> str:
    data = Path(path).read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("command", ["bake", "merge"])
def test_model_spec_is_the_results(command: str) -> None:
    before = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": "Base",
        "modelspec.author": "somebody",
        "modelspec.date": "2023-01-01",
        "modelspec.hash_sha256": "0x00",
        "modelspec.unet_dtype": "float32",
        "sshs_model_hash": "00",
        "format": "pt",
    }
    write(Path("model.safetensors"), checkpoint(), before)
    succeed(command, "model.safetensors", "a.safetensors:0.5", "b.safetensors", "-o", "mix.safetensors")
    found = metadata("mix.safetensors")
    names = [f"{name} ({sha256(f'{name}.safetensors')[:10]})" for name in "ab"]
    assert {key: text for key, text in found.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.title": "mix",
        "modelspec.author": "somebody",
        "modelspec.unet_dtype": "float32",
        "modelspec.merged_from": ", ".join(["Base", *names]),
        "modelspec.hash_sha256": "0x" + data_hash("mix.safetensors"),
    }
    assert found["sshs_model_hash"] == data_hash("mix.safetensors")
    assert found["format"] == "pt"

    recipe = json.loads(found[f"lycotool.{command}"])
    adapters = recipe["adapters"] if command == "bake" else recipe["inputs"][1:]
    assert [(a["file"], a.get("strength", 1.0), a["sha256"]) for a in adapters] == [
        ("a.safetensors", 0.5, sha256("a.safetensors")),
        ("b.safetensors", 1.0, sha256("b.safetensors")),
    ]


def test_what_a_checkpoint_was_merged_from_before_is_kept() -> None:
    before = {"modelspec.architecture": "flux-1-dev", "modelspec.merged_from": "one, two"}
    write(Path("model.safetensors"), checkpoint(), before)
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "mix.safetensors")
    assert metadata("mix.safetensors")["modelspec.merged_from"].startswith("one, two, a (")
    succeed("bake", "mix.safetensors", "a.safetensors", "--unbake", "-o", "back.safetensors")
    assert json.loads(metadata("back.safetensors")["lycotool.bake"])["unbake"] is True


def test_dtypes_of_before_are_not_said_of_another_dtype() -> None:
    before = {
        "modelspec.architecture": "x",
        "modelspec.unet_dtype": "float32",
        "modelspec.vae_dtype": "float32",
    }
    write(Path("model.safetensors"), checkpoint(), before)
    succeed("bake", "model.safetensors", "a.safetensors", "--dtype", "fp16", "-o", "mix.safetensors")
    assert not {"modelspec.unet_dtype", "modelspec.vae_dtype"} & metadata("mix.safetensors").keys()


@pytest.mark.parametrize("width", [768, 1024])
def test_the_architecture_is_said_where_the_keys_tell_it(width: int) -> None:
    """SD 1 by the width of its text encoder; SD 2 was published in two architectures with the same keys."""
    write(Path("model.safetensors"), {LDM: torch.randn(4, width)})
    module = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    write(Path("c.safetensors"), lora(module, 4, width))
    succeed("bake", "model.safetensors", "c.safetensors", "-o", "mix.safetensors")
    found = metadata("mix.safetensors")
    if width == 1024:
        assert not [key for key in found if key.startswith("modelspec.")]
        return
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.merged_from"].startswith("model, c (")
    assert found["modelspec.hash_sha256"] == "0x" + data_hash("mix.safetensors")


def test_an_unknown_model_gets_no_spec() -> None:
    write(Path("model.safetensors"), checkpoint())
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "mix.safetensors")
    assert not [key for key in metadata("mix.safetensors") if key.startswith("modelspec.")]


def test_hashes_of_scales_written_last(in_folder: Path) -> None:
    """Their bytes come after the weights', and stand before them in the file."""
    key = "model.diffusion_model.down.a"
    tensors = {
        f"{key}.weight": torch.randn(6, 5).to(torch.float8_e4m3fn),
        f"{key}.scale_weight": torch.tensor(0.5),
    }
    write(Path("model.safetensors"), tensors, {"modelspec.architecture": "x", "sshs_model_hash": ""})
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "mix.safetensors")
    found = metadata("mix.safetensors")
    assert found["sshs_model_hash"] == data_hash("mix.safetensors")
    assert found["modelspec.hash_sha256"] == "0x" + data_hash("mix.safetensors")


def test_files_of_a_folder_say_what_changed_them(in_folder: Path) -> None:
    for name, tensors in (
        ("unet", {"down.a.weight": torch.randn(6, 5)}),
        ("vae", {"x.weight": torch.ones(2)}),
    ):
        Path(f"pipe/{name}").mkdir(parents=True)
        write(Path(f"pipe/{name}/diffusion_pytorch_model.safetensors"), tensors, {"own": name})
    succeed("bake", "pipe", "a.safetensors", "-o", "out")
    found: dict[str, Any] = {
        name: metadata(f"out/{name}/diffusion_pytorch_model.safetensors") for name in ("unet", "vae")
    }
    assert json.loads(found["unet"]["lycotool.bake"])["adapters"][0]["file"] == "a.safetensors"
    assert found["vae"] == {"own": "vae", "format": "pt"}
    assert found["unet"]["own"] == "unet"
