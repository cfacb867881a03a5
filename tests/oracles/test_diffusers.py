"""diffusers: a baked checkpoint gives the UNet the outputs it has with the adapter loaded.

The models are narrow, with the real block structure and names; see makers.architectures.
diffusers' own loader puts the adapter on the UNet, its own converter reads the baked
single file back.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from makers import architectures as arch
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from oracles.support import assert_near, bake, randomise

DATA = Path(__file__).resolve().parents[1] / "data"

# Outputs in float32 roundings of the largest element. They are computed in float64, so what
# differs is the rounding of the baked weights to float32, which about 60 layers in a row pass
# on. Measured: at most 9, and 38 for LoKr, whose change is many times the weight.
OUTPUT = 128

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
#: Every linear layer and convolution of the UNet, by the ends of their names.
EVERYWHERE = [
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1", "linear_2",
    "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv",
]  # fmt: skip
ATTENTION_LAYERS = 16 * 8
UNET_LAYERS = 16 * 12 + 22 * 3 + 14 + 6 + 4

Config = LoraConfig | LoKrConfig

CONFIGS: dict[str, Config] = {
    "attention": LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
    "alpha": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION),
    "everywhere": LoraConfig(r=4, lora_alpha=2, target_modules=EVERYWHERE),
    "rslora": LoraConfig(r=4, lora_alpha=3, target_modules=EVERYWHERE, use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=EVERYWHERE,
        rank_pattern={"attn2.to_k": 2, "^conv_in": 1, r"down_blocks\.\d+\.resnets\.1\.conv1": 3},
        alpha_pattern={"to_q": 1.5, "up_blocks.2.upsamplers.0.conv": 8},
    ),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=EVERYWHERE, use_dora=True),
    "lokr": LoKrConfig(r=1, alpha=3, target_modules=ATTENTION),
    # Both factors whole, where PEFT (and so diffusers) still multiplies by alpha/r.
    "lokr whole": LoKrConfig(r=32, alpha=16, target_modules=ATTENTION),
}


def output(unet: nn.Module) -> Tensor:
    """What a UNet makes of fixed inputs, in float64, so that kernels of the CPU do not matter.

    The UNet is float64 afterwards: none of these tests needs it again, and a copy takes longer than all else here.
    """
    sample = arch.random_values("sample", (2, 4, 8, 8), 1.0, seed=1).double()
    context = arch.random_values("context", (2, 7, arch.CLIP_L_WIDTH), 1.0, seed=2).double()
    with torch.no_grad():
        result: Tensor = unet.double()(sample, torch.tensor([10, 700]), context).sample
    return result


def trained(config: Config) -> nn.Module:
    unet = arch.sd1_unet()
    unet.add_adapter(copy.deepcopy(config))  # it is completed in place
    randomise(unet, seed=3, std=0.2, marks=("lora_",))
    randomise(unet, seed=3, std=0.6, marks=("lokr_",))
    return unet.eval()


def save_as_pipelines_do(unet: nn.Module, folder: Path, *, with_metadata: bool = True) -> Path:
    """Save with ``unet.`` before every name, as diffusers' training scripts do."""
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict() if with_metadata else None,
    )
    return folder / "pytorch_lora_weights.safetensors"


def load_as_pipelines_do(path: Path) -> nn.Module:
    unet = arch.sd1_unet()
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    return unet.eval()


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "sd1.safetensors"
    save_file(arch.sd1_single_file(torch.float32), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The UNet and text encoder as a pipeline's folder, written by their own classes."""
    root = tmp_path_factory.mktemp("folder") / "sd1"
    arch.sd1_unet().save_pretrained(root / "unet")
    text = arch.sd1_text_encoder()
    clip: Any = text if isinstance(text, CLIPTextModel) else text.text_model
    clip.save_pretrained(root / "text_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def unet_of(single_file: Path) -> nn.Module:
    unet = arch.sd1_unet()
    unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(single_file), unet.config))
    return unet


@functools.cache
def output_without() -> Tensor:
    return output(arch.sd1_unet())


def assert_output(found: nn.Module, expected: Tensor) -> None:
    before = output_without()
    assert (expected - before).norm() > 0.1 * before.norm()
    assert_near(output(found), expected, OUTPUT)


# Files with an alpha that is not the rank are those of "everywhere", of the same layers and more.
@pytest.mark.parametrize(
    "config", [pytest.param(CONFIGS[name], id=name) for name in CONFIGS if name != "alpha"]
)
def test_saved_by_pipelines(config: Config, single_file: Path, folder: Path, tmp_path: Path) -> None:
    adapter = save_as_pipelines_do(trained(config), tmp_path)
    expected = output(load_as_pipelines_do(adapter))

    result = bake(single_file, adapter, tmp_path / "baked.safetensors")
    assert result.changed == (UNET_LAYERS if "conv_in" in config.target_modules else ATTENTION_LAYERS)
    assert_output(unet_of(tmp_path / "baked.safetensors"), expected)

    bake(folder, adapter, tmp_path / "baked")
    assert_output(UNet2DConditionModel.from_pretrained(tmp_path / "baked" / "unet"), expected)


def test_rest_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """A UNet adapter leaves everything else in the folder as it is."""
    bake(folder, save_as_pipelines_do(trained(CONFIGS["attention"]), tmp_path), tmp_path / "baked")
    for name in ("model_index.json", "unet/config.json", "text_encoder/config.json"):
        assert (tmp_path / "baked" / name).read_bytes() == (folder / name).read_bytes()
    text = "text_encoder/model.safetensors"
    before, after = load_file(folder / text), load_file(tmp_path / "baked" / text)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_without_metadata(single_file: Path, tmp_path: Path) -> None:
    """Older files say nothing of alpha, and diffusers takes the rank."""
    adapter = save_as_pipelines_do(trained(CONFIGS["alpha"]), tmp_path, with_metadata=False)
    bake(single_file, adapter, tmp_path / "baked.safetensors")
    assert_output(unet_of(tmp_path / "baked.safetensors"), output(load_as_pipelines_do(adapter)))


@pytest.mark.parametrize("name", ["attention", "patterns", "lokr whole"])
def test_saved_by_the_model(name: str, single_file: Path, tmp_path: Path) -> None:
    """``unet.save_lora_adapter`` writes names and metadata without ``unet.``."""
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    trained(CONFIGS[name]).save_lora_adapter(tmp_path)
    loaded = arch.sd1_unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name=adapter.name)
    bake(single_file, adapter, tmp_path / "baked.safetensors")
    assert_output(unet_of(tmp_path / "baked.safetensors"), output(loaded))


def test_kohya_file(single_file: Path, tmp_path: Path) -> None:
    """Diffusers reads the sample of sd-scripts' naming, with alpha and convolutions."""
    adapter = tmp_path / "unet.safetensors"
    tensors = load_file(DATA / "lora.safetensors")
    save_file({key: value.float() for key, value in tensors.items() if key.startswith("lora_unet_")}, adapter)
    bake(single_file, adapter, tmp_path / "baked.safetensors")
    assert_output(unet_of(tmp_path / "baked.safetensors"), output(load_as_pipelines_do(adapter)))


@pytest.mark.parametrize("is_wrapped", [True, False], ids=["with text_model", "without text_model"])
def test_text_encoder(is_wrapped: bool, single_file: Path, folder: Path, tmp_path: Path) -> None:
    """Transformers 5 dropped ``text_model`` from the paths that older files have."""
    model = arch.sd1_text_encoder()
    adapted = model if is_wrapped or isinstance(model, CLIPTextModel) else model.text_model
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "out_proj", "fc1", "fc2"])
    inject_adapter_in_model(config, adapted)
    randomise(adapted, seed=4, std=0.2, marks=("lora_",))
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=get_peft_model_state_dict(adapted),
        text_encoder_lora_adapter_metadata=config.to_dict(),
    )
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    tokens = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected = model(tokens)

    bake(single_file, adapter, tmp_path / "baked.safetensors")
    prefix = arch.SD1_CLIP_PREFIX
    state = load_file(tmp_path / "baked.safetensors")
    names = arch.sd1_text_encoder().state_dict()
    plain = arch.sd1_text_encoder()
    plain.load_state_dict({name: state[prefix + name] for name in names})
    with torch.no_grad():
        assert (plain(tokens) - arch.sd1_text_encoder()(tokens)).norm() > 0.1 * expected.norm()
        assert_near(plain(tokens), expected, OUTPUT)

    bake(folder, adapter, tmp_path / "baked")
    loaded = CLIPTextModel.from_pretrained(tmp_path / "baked" / "text_encoder")
    with torch.no_grad():
        assert_near(loaded(tokens).last_hidden_state, expected, OUTPUT)
