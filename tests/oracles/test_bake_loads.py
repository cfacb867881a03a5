"""What `bake` writes, loaded by the libraries it is written for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from helpers import read, succeed, write
from makers import bases
from makers.ldm_names import vae_to_ldm, with_prefix
from torch import Tensor
from transformers import CLIPTextModel

EPS = torch.finfo(torch.float32).eps

UNET_LAYERS = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"]
TEXT_LAYER = "text_model.encoder.layers.1.mlp.fc1"


def lora_for(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA in sd-scripts' names, and its change of each layer in float64."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    changes = {}
    for path, (rows, columns, *kernel) in shapes.items():
        prefix = "lora_te_" if path.startswith("text_model") else "lora_unet_"
        name = prefix + path.replace(".", "_")
        up = 0.1 * torch.randn(rows, 2, *(1 for _ in kernel), generator=generator)
        down = torch.randn(2, columns, *kernel, generator=generator)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        product = 0.5 * up.double().flatten(1) @ down.double().flatten(1)
        changes[path] = product.view(rows, columns, *kernel)
    return tensors, changes


def assert_changed(model: Any, before: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        change = changes.get(key.removesuffix(".weight"))
        if change is None:
            assert torch.equal(tensor, before[key]), key
        else:
            exact = before[key].double() + change
            # Two products and a sum in float32, and the rounding of the result.
            assert (tensor.double() - exact).abs().max() <= 4 * EPS * exact.abs().max(), key


@pytest.fixture(scope="module")
def base() -> bases.MicroBase:
    return bases.micro_base("sd1", seed=3)


@pytest.fixture(scope="module")
def folder(base: bases.MicroBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.write_folder(base, tmp_path_factory.mktemp("folder") / "pipe")


def shapes_of(base: bases.MicroBase) -> dict[str, tuple[int, ...]]:
    unet, text = base.unet.state_dict(), base.text_encoders[0].state_dict()
    shapes = {path: tuple(unet[f"{path}.weight"].shape) for path in UNET_LAYERS}
    return shapes | {TEXT_LAYER: tuple(text[f"{TEXT_LAYER.removeprefix('text_model.')}.weight"].shape)}


def text_changes(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers 5 has no outer level in this class."""
    return {path.removeprefix("text_model."): change for path, change in changes.items()}


@pytest.mark.parametrize("options", [(), ("--shard-size", "1MB")], ids=["whole", "sharded"])
def test_diffusers_folder(
    options: tuple[str, ...], base: bases.MicroBase, folder: Path, tmp_path: Path
) -> None:
    tensors, changes = lora_for(shapes_of(base))
    adapter = write(tmp_path / "lora.safetensors", tensors)
    out = tmp_path / "out"
    succeed("bake", folder, adapter, *options, "--verify", "-o", out)

    pipe: Any = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert_changed(pipe.unet, base.unet.state_dict(), changes)
    assert_changed(pipe.text_encoder, base.text_encoders[0].state_dict(), text_changes(changes))
    assert_changed(pipe.vae, base.vae.state_dict(), {})
    if options:
        # diffusers' own names for the same size: the numbers of shards differ with the order of tensors.
        base.unet.save_pretrained(tmp_path / "own", max_shard_size="1MB")
        patterns = [
            {re.sub(r"\d{5}", "N", path.name) for path in place.iterdir()}
            for place in (tmp_path / "own", out / "unet")
        ]
        assert patterns[0] == patterns[1]
        total = json.loads((out / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
        own = json.loads((tmp_path / "own/diffusion_pytorch_model.safetensors.index.json").read_text())
        assert total["metadata"] == own["metadata"]
        assert total["weight_map"].keys() == own["weight_map"].keys()
        assert all(path.stat().st_size < 1.1e6 for path in (out / "unet").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_a_folder_that_diffusers_sharded_keeps_its_shards(
    dtype: str, base: bases.MicroBase, folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "pipe"
    shutil.copytree(folder, source)
    shutil.rmtree(source / "unet")
    base.unet.save_pretrained(source / "unet", max_shard_size="2MB")
    (source / "unet/diffusion_pytorch_model.bin.index.json").write_text("{}")
    tensors, changes = lora_for(shapes_of(base))
    adapter = write(tmp_path / "lora.safetensors", tensors)
    succeed("bake", source, adapter, "--dtype", dtype, "-o", tmp_path / "out")

    out = tmp_path / "out/unet"
    index = "diffusion_pytorch_model.safetensors.index.json"
    before, after = (json.loads((place / index).read_text()) for place in (source / "unet", out))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] * (2 if dtype == "fp16" else 1) == before["metadata"]["total_size"]
    assert {path.name for path in out.iterdir()} == {index, "config.json", *after["weight_map"].values()}
    if dtype == "keep":
        assert_changed(UNet2DConditionModel.from_pretrained(out), base.unet.state_dict(), changes)


def test_a_variant_is_sharded_under_its_name(base: bases.MicroBase, tmp_path: Path) -> None:
    source = tmp_path / "pipe"
    base.unet.save_pretrained(source / "unet", variant="fp16")
    tensors, changes = lora_for({path: shapes_of(base)[path] for path in UNET_LAYERS})
    adapter = write(tmp_path / "lora.safetensors", tensors)
    succeed("bake", source, adapter, "--shard-size", "1MB", "-o", tmp_path / "out")
    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", variant="fp16")
    assert_changed(loaded, base.unet.state_dict(), changes)
    # And lycotool reads it again, as it does what diffusers shards itself.
    base.unet.save_pretrained(tmp_path / "own/unet", variant="fp16", max_shard_size="1MB")
    for folder in ("out", "own"):
        succeed("bake", tmp_path / folder, adapter, "-o", tmp_path / f"{folder}-again")
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / f"{folder}-again/unet", variant="fp16")
        assert loaded.state_dict().keys() == base.unet.state_dict().keys()


@pytest.mark.parametrize("options", [(), ("--shard-size", "700KB")], ids=["as the input", "another size"])
def test_transformers_index(options: tuple[str, ...], base: bases.MicroBase, tmp_path: Path) -> None:
    model = base.text_encoders[0]
    model.save_pretrained(tmp_path / "in", max_shard_size="400KB")
    before = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())
    tensors, changes = lora_for({TEXT_LAYER: shapes_of(base)[TEXT_LAYER]})
    adapter = write(
        tmp_path / "lora.safetensors", {f"lora_{k.removeprefix('lora_te_')}": t for k, t in tensors.items()}
    )
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "in/config.json", tmp_path / "out")
    output = tmp_path / "out/model.safetensors.index.json"

    result = succeed("merge", tmp_path / "in/model.safetensors.index.json", adapter, *options, "-o", output)

    assert result.stdout == f"{output}\n"
    assert_changed(CLIPTextModel.from_pretrained(tmp_path / "out"), model.state_dict(), text_changes(changes))
    after = json.loads(output.read_text())
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    if not options:
        groups = [
            sorted(
                sorted(k for k, v in index["weight_map"].items() if v == name)
                for name in set(index["weight_map"].values())
            )
            for index in (before, after)
        ]
        assert groups[0] == groups[1]


# --- --vae ---------------------------------------------------------------------------------

EARLIER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def vae_files(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A VAE in every naming that files have."""
    native = vae_to_ldm(dict(state))
    earlier = dict(state)
    for new, old in EARLIER.items():
        earlier = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for key, t in earlier.items()
        }
    return {
        "LDM": native,
        "LDM with loss": native | {"loss.logvar": torch.zeros(())},
        "whole checkpoint": with_prefix("first_stage_model.", native) | {"betas": torch.ones(3)},
        "diffusers": dict(state),
        "diffusers before 0.17": earlier,
        "half": {key: tensor.half() for key, tensor in state.items()},
    }


NAMINGS = ["LDM", "LDM with loss", "whole checkpoint", "diffusers", "diffusers before 0.17", "half"]


@pytest.mark.parametrize("naming", NAMINGS)
def test_vae_of_a_folder(naming: str, base: bases.MicroBase, folder: Path, tmp_path: Path) -> None:
    other = bases.micro_base("sd1", seed=4).vae.state_dict()
    vae = write(tmp_path / "vae.safetensors", vae_files(other)[naming])
    succeed("bake", folder, "--vae", vae, "--verify", "-o", tmp_path / "out")
    loaded: Any = AutoencoderKL.from_pretrained(tmp_path / "out/vae")
    expected = {key: tensor.half().float() if naming == "half" else tensor for key, tensor in other.items()}
    assert_changed(loaded, expected, {})
    assert_changed(UNet2DConditionModel.from_pretrained(tmp_path / "out/unet"), base.unet.state_dict(), {})


@pytest.mark.parametrize("of", ["component", "pipeline"])
def test_vae_from_a_folder(of: str, base: bases.MicroBase, folder: Path, tmp_path: Path) -> None:
    other = bases.micro_base("sd1", seed=4).vae
    source = tmp_path / "other"
    other.save_pretrained(source / "vae" if of == "pipeline" else source)
    checkpoint = write(tmp_path / "base.safetensors", bases.single_file(base))
    succeed("bake", checkpoint, "--vae", source, "-o", tmp_path / "out.safetensors")
    after = read(tmp_path / "out.safetensors")
    expected = with_prefix("first_stage_model.", vae_to_ldm(other.state_dict()))
    assert all(torch.equal(after[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("naming", NAMINGS)
def test_vae_of_a_single_file(naming: str, prefix: str, base: bases.MicroBase, tmp_path: Path) -> None:
    before = {key.replace("first_stage_model.", prefix): t for key, t in bases.single_file(base).items()}
    checkpoint = write(tmp_path / "base.safetensors", before)
    other = bases.micro_base("sd1", seed=4).vae
    vae = write(tmp_path / "vae.safetensors", vae_files(other.state_dict())[naming])
    succeed("bake", checkpoint, "--vae", vae, "-o", tmp_path / "out.safetensors")
    after = read(tmp_path / "out.safetensors")
    assert after.keys() == before.keys()
    for key in before:
        assert after[key].shape == before[key].shape
        if not key.startswith(prefix):
            assert torch.equal(after[key], before[key])
    converted = convert_ldm_vae_checkpoint(
        {key: tensor for key, tensor in after.items() if key.startswith(prefix)}, dict(other.config)
    )
    half = torch.float16 if naming == "half" else torch.float32
    for key, tensor in other.state_dict().items():
        assert torch.equal(converted[key], tensor.to(half)), key
