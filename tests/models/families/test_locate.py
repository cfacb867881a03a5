"""Modules found by the names that adapters give them, and families guessed from those."""

from __future__ import annotations

import pytest

from lycotool.models.families import FAMILIES
from lycotool.models.families.locate import Locator, guess_families

Q = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("family", "name", "component", "path"),
    [
        ("sd1", f"lora_unet_{Q}", "unet", Q),
        ("sd1", f"oft_unet_{Q}", "unet", Q),
        ("sd1", f"lycoris_{Q}", "unet", Q),
        ("sd1", "unet.conv_in", "unet", "conv_in"),
        ("sd1", "base_model.model.conv_in", "unet", "conv_in"),
        ("sd1", "diffusion_model.input_blocks.0.0", "unet", "conv_in"),
        ("sd1", "lora_te_text_model_encoder_layers_3_mlp_fc1", "te1", "encoder_layers_3_mlp_fc1"),
        ("sd1", "text_encoder.text_model.encoder.layers.3.mlp.fc1", "te1", "encoder_layers_3_mlp_fc1"),
        ("sd1", "text_model.encoder.layers.3.mlp.fc1", "te1", "encoder_layers_3_mlp_fc1"),
        ("sdxl", "lora_te2_text_projection", "te2", "text_projection"),
        ("sdxl", "lora_unet_label_emb_0_0", "unet", "add_embedding_linear_1"),
        ("flux1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "te2", None),
        ("flux1", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "te2", None),
        ("flux1", "lora_transformer_proj_out", "unet", "proj_out"),
        ("flux1", "double_blocks.0.img_attn.proj", "unet", "transformer_blocks_0_attn_to_out_0"),
    ],
)
def test_locate(family: str, name: str, component: str, path: str | None) -> None:
    (place,) = Locator(FAMILIES[family]).locate(name)

    assert place.component == component
    if path is not None:
        assert str(place.site.path("diffusers")).replace(".", "_") == path


@pytest.mark.parametrize(
    "name", ["lora_unet_nowhere", "lora_te_nowhere", "vae.conv_in", "lora_te2_text_projection"]
)
def test_what_a_family_does_not_have_is_not_found(name: str) -> None:
    assert Locator(FAMILIES["sd1"]).locate(name) == []


@pytest.mark.parametrize(
    ("names", "widths", "metadata", "families"),
    [
        ([f"lora_unet_{Q.replace('attn1', 'attn2').replace('to_q', 'to_k')}"], 768, {}, ["sd1"]),
        ([f"lora_unet_{Q.replace('attn1', 'attn2').replace('to_q', 'to_k')}"], 1024, {}, ["sd2"]),
        (["lora_te_text_model_encoder_layers_0_self_attn_q_proj"], 1024, {}, ["sd2"]),
        ([f"lora_unet_{Q}"], 320, {"ss_base_model_version": "sd_v2_v"}, ["sd2"]),
        ([f"lora_unet_{Q}"], 320, {"ss_base_model_version": "flux1"}, ["sdxl", "sd1", "sd2"]),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], 768, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, ["sdxl"]),
        (["lora_unet_nowhere"], 8, {}, []),
        ([], 8, {}, []),
    ],
)  # fmt: skip
def test_guess(names: list[str], widths: int, metadata: dict[str, str], families: list[str]) -> None:
    found = guess_families(names, dict.fromkeys(names, widths), metadata)

    assert sorted(found) == sorted(families)


def test_a_name_for_the_first_parts_of_a_module() -> None:
    (place,) = Locator(FAMILIES["flux1"]).locate("single_blocks.7.linear1_qkv")

    assert place.parts == 3
    assert place.site.path("native") == "single_blocks.7.linear1"
