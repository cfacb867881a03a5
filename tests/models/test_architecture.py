"""Guessing the model an adapter or a checkpoint is for."""

import pytest
import torch
from makers import architectures as arch

from lycotool.models.architecture import Guess, guess_architecture, guess_checkpoint


def guess(*modules: str, widths: dict[str, int] | None = None, **metadata: str) -> str:
    return guess_architecture(modules, widths or {}, metadata).name


TO_K = {
    "kohya": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
    "kohya, single-file": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "LyCORIS": "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
    "ComfyUI": "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
}


@pytest.mark.parametrize("name", TO_K.values(), ids=TO_K)
@pytest.mark.parametrize(("width", "family"), [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_the_context_width_tells_the_sd_family(name: str, width: int, family: str) -> None:
    found = guess_architecture([name], {name: width}, {})

    assert found == Guess(family, f"cross-attention width {width}")


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux.1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux.1 or HunyuanVideo"),
        ("diffusion_model.double_blocks.0.img_mod.lin", "Flux.1"),
        ("transformer.single_transformer_blocks.37.attn.to_q", "Flux.1 (diffusers)"),
        ("lora_unet_double_stream_modulation_img_lin", "Flux.2"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", "Chroma"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "SD 3"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"),
        ("lora_unet_llm_adapter_blocks_0_mlp_0", "Anima"),
        ("diffusion_model.noise_refiner.0.attention.qkv", "Z-Image or Lumina 2"),
        ("diffusion_model.layers.0.feed_forward.w1", "Z-Image or Lumina 2"),
        ("diffusion_model.blocks.0.cross_attn.k_img", "Wan"),
        ("lora_unet_blocks_0_ffn_0", "Wan"),
    ],
)
def test_names_tell_the_family(module: str, family: str) -> None:
    found = guess_architecture([module, "lora_te_text_model_encoder_layers_0_mlp_fc1"], {}, {})

    assert found.name == family
    assert found.evidence.startswith("module names with ")


def test_a_second_text_encoder_tells_sdxl() -> None:
    assert guess("lora_te2_text_model_encoder_layers_0_mlp_fc1") == "SDXL"
    assert guess("text_encoder_2.text_model.encoder.layers.0.mlp.fc1") == "SDXL"


def test_ten_transformer_layers_tell_sdxl() -> None:
    assert guess("lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_ff_net_2") == "SDXL"


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "sd_v1"}, "SD 1.x"),
        ({"ss_base_model_version": "sd_v2_v"}, "SD 2.x"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD 1.x"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2.x"),
        ({"ss_base_model_version": "a-new-model"}, "a-new-model"),
    ],
)
def test_metadata_is_asked_last(metadata: dict[str, str], family: str) -> None:
    vague = "lora_unet_down_blocks_0_resnets_0_conv1"

    assert guess(vague, **metadata) == family
    assert guess(vague, TO_K["kohya"], widths={TO_K["kohya"]: 768}, **metadata) == "SD 1.x"


def test_block_names_alone_tell_an_sd_unet() -> None:
    assert guess("lora_unet_down_blocks_0_resnets_0_conv1") == "SD UNet"
    assert guess("lora_unet_output_blocks_0_0_in_layers_2") == "SD UNet"


def test_nothing_is_told_by_nothing() -> None:
    assert guess_architecture(["x"], {}, {}) == Guess("unknown", "no known module names")
    assert guess() == "unknown"


def test_a_text_encoders_layers_are_no_denoisers() -> None:
    """T5's and CLIP's own paths must not be taken for a diffusion model's."""
    assert guess("lora_te1_text_model_encoder_layers_0_self_attn_k_proj") == "unknown"
    assert guess("lora_te3_encoder_block_0_layer_1_ffn_0") == "unknown"


@pytest.mark.parametrize(
    ("make", "family"),
    [(arch.sd1_single_file, "SD 1.x"), (arch.sd2_single_file, "SD 2.x"), (arch.sdxl_single_file, "SDXL")],
    ids=["sd1", "sd2", "sdxl"],
)
def test_single_files_are_told_by_their_text_encoder(make: object, family: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make(torch.float16).items()}

    assert guess_checkpoint(shapes, {}).name == family


@pytest.mark.parametrize(("width", "family"), [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_a_unet_alone_is_told_by_its_width(width: int, family: str) -> None:
    shapes = {f"{TO_K['diffusers']}.weight": (320, width), "unet.conv_in.bias": (320,)}

    assert guess_checkpoint(shapes, {}).name == family


def test_a_refiner_is_told() -> None:
    assert (
        guess_checkpoint({"conditioner.embedders.0.model.ln_final.weight": (1280,)}, {}).name
        == "SDXL refiner"
    )
