"""``--vae``: what does not fit is refused by name; what fits is compared with diffusers in tests/oracles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import lora, read, run, succeed, write
from makers.ldm_names import vae_to_ldm, with_prefix
from safetensors import safe_open
from torch import Tensor

PREFIX = "first_stage_model."


def vae(seed: int = 0, width: int = 4) -> dict[str, Tensor]:
    """A VAE of two levels in diffusers' names, without most of its layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "encoder.down_blocks.0.resnets.0.conv1.weight": (width, width, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv1.weight": (width, width, 3, 3),
        "decoder.up_blocks.0.resnets.0.conv1.weight": (width, width, 3, 3),
        "decoder.up_blocks.1.resnets.0.conv1.weight": (2 * width, width, 3, 3),
        "encoder.mid_block.attentions.0.to_q.weight": (width, width),
        "encoder.mid_block.attentions.0.to_q.bias": (width,),
        "post_quant_conv.weight": (width, width, 1, 1),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = {"model.diffusion_model.down.a.weight": torch.randn(6, 5)}
    write(Path("model.safetensors"), model | with_prefix(PREFIX, vae_to_ldm(vae(1))))
    write(Path("a.safetensors"), lora())
    return tmp_path


def refused(tensors: dict[str, Tensor], checkpoint: str = "model.safetensors") -> str:
    write(Path("vae.safetensors"), tensors)
    result = run("bake", checkpoint, "--vae", "vae.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 5
    assert not Path("out.safetensors").exists()
    return result.stderr


def test_levels_are_turned_and_matrices_become_kernels() -> None:
    other = vae(2)
    write(Path("vae.safetensors"), other)
    succeed("bake", "model.safetensors", "a.safetensors", "--vae", "vae.safetensors", "-o", "out.safetensors")
    after = read(Path("out.safetensors"))
    expected = with_prefix(PREFIX, vae_to_ldm(other))
    assert all(torch.equal(after[key], tensor) for key, tensor in expected.items())
    before = read(Path("model.safetensors"))["model.diffusion_model.down.a.weight"]
    assert not torch.equal(after["model.diffusion_model.down.a.weight"], before)
    with safe_open("out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lycotool.bake"])["vae"] == "vae.safetensors"


def test_its_own_dtype_is_kept_unless_another_is_asked_for() -> None:
    write(Path("vae.safetensors"), {key: tensor.half() for key, tensor in vae(2).items()})
    arguments = ("bake", "model.safetensors", "--vae", "vae.safetensors", "-f", "-o", "out.safetensors")
    for options, dtype in (((), torch.float16), (("--dtype", "bf16"), torch.bfloat16)):
        succeed(*arguments, *options, "--verify")
        found = read(Path("out.safetensors"))
        assert {t.dtype for key, t in found.items() if key.startswith(PREFIX)} == {dtype}


def test_missing_and_unknown_tensors_are_listed() -> None:
    tensors = vae(2) | {"quant_conv.weight": torch.ones(4, 4, 1, 1)}
    del tensors["encoder.mid_block.attentions.0.to_q.bias"]
    text = refused(tensors)
    assert "encoder.mid.attn_1.q.bias: not in vae.safetensors" in text
    assert "quant_conv.weight: not in model.safetensors" in text


def test_other_shapes_are_listed() -> None:
    text = refused(vae_to_ldm(vae(2, width=8)))
    assert "encoder.mid.attn_1.q.weight: shape [8, 8, 1, 1], expected [4, 4, 1, 1]" in text
    assert "decoder.up.0.block.0.conv1.weight: shape [16, 8, 3, 3], expected [8, 4, 3, 3]" in text


def test_a_matrix_is_no_kernel_elsewhere() -> None:
    tensors = vae(2)
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"][:, :, 0, 0]
    assert "post_quant_conv.weight: shape [4, 4], expected [4, 4, 1, 1]" in refused(tensors)


def test_a_file_without_a_vae() -> None:
    assert "vae.safetensors: has no VAE" in refused({"unet.conv_in.weight": torch.ones(2)})


def test_a_checkpoint_without_a_vae() -> None:
    write(Path("unet.safetensors"), {"model.diffusion_model.down.a.weight": torch.randn(6, 5)})
    assert "unet.safetensors: has no VAE to replace" in refused(vae(), "unet.safetensors")


def test_no_such_file() -> None:
    result = run("bake", "model.safetensors", "--vae", "nowhere.safetensors")
    assert result.exit_code == 2
    assert "nowhere.safetensors" in result.stderr


def test_the_vae_is_never_overwritten() -> None:
    write(Path("vae.safetensors"), vae(2))
    result = run("bake", "model.safetensors", "--vae", "vae.safetensors", "-f", "-o", "vae.safetensors")
    assert result.exit_code == 7
    assert read(Path("vae.safetensors")).keys() == vae().keys()
