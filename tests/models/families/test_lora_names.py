"""The naming of each family's adapters against diffusers' converters of adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from models.families.states import State, diffusers_state, native_state

from lycotool.models.families import FAMILIES
from lycotool.models.naming import flat


def _matrices(state: State) -> State:
    """Weights by module; the tables' norms have one dimension."""
    return {
        key.removesuffix(".weight"): tensor
        for key, tensor in state.items()
        if key.endswith(".weight") and tensor.dim() == 2
    }


def _blocks_only(path: str) -> bool:
    return path.startswith(("double_blocks.", "single_blocks.", "blocks."))


#: Family, variant, converter, which modules it reads.
KOHYA: list[tuple[str, str, Callable[[State], State], Callable[[str], bool]]] = [
    ("flux1", "dev", lora_conversion_utils._convert_kohya_flux_lora_to_diffusers, _blocks_only),
    ("flux2", "dev", lora_conversion_utils._convert_kohya_flux2_lora_to_diffusers, _blocks_only),
    ("wan", "t2v 1.3b", lora_conversion_utils._convert_musubi_wan_lora_to_diffusers, _blocks_only),
    ("wan", "i2v 14b", lora_conversion_utils._convert_musubi_wan_lora_to_diffusers, _blocks_only),
    ("qwen-image", "", lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers, lambda _: True),
    (
        "z-image",
        "turbo",
        lora_conversion_utils._convert_non_diffusers_z_image_lora_to_diffusers,
        lambda _: True,
    ),
]


@pytest.mark.parametrize(("family", "variant", "convert", "reads"), KOHYA)
def test_kohya_names(
    family: str, variant: str, convert: Callable[[State], State], reads: Callable[[str], bool]
) -> None:
    diffusers = diffusers_state(family, variant)
    is_native = FAMILIES[family].kohya == "native"
    weights = _matrices(native_state(family, variant, diffusers) if is_native else diffusers)
    adapter: State = {}
    for path, weight in weights.items():
        if reads(path):
            name = f"lora_unet_{flat(path)}"
            adapter[f"{name}.lora_down.weight"] = torch.ones(1, 2)
            adapter[f"{name}.lora_up.weight"] = weight[:, :1]
            adapter[f"{name}.alpha"] = torch.tensor(1.0)
    assert adapter
    expected = _matrices(diffusers)
    ups = {key: up for key, up in convert(adapter).items() if key.endswith(".lora_B.weight")}
    assert {*ups} <= {f"transformer.{path}.lora_B.weight" for path in expected}
    assert sum(up.shape[0] for up in ups.values()) == sum(
        weight.shape[0] for path, weight in weights.items() if reads(path)
    )
    for key, up in ups.items():
        path = key.removeprefix("transformer.").removesuffix(".lora_B.weight")
        assert torch.equal(up, expected[path][:, :1]), key


def test_anima_has_its_adapter_beside_the_transformer() -> None:
    family = FAMILIES["anima"]
    # The converter leaves the norms of queries and keys as they are.
    rules = [rule for rule in family.unet.rules if not (rule.native or "").endswith(("q_norm", "k_norm"))]
    adapter = {f"diffusion_model.{rule.native}.lora_A.weight": torch.zeros(1) for rule in rules}
    converted = lora_conversion_utils._convert_non_diffusers_anima_lora_to_diffusers(adapter)
    expected = [path for rule in rules for path in rule.diffusers]
    assert [*converted] == [
        f"{'' if path.startswith(family.beside) else family.diffusers_prefix}{path}.lora_A.weight"
        for path in expected
    ]


#: From sd-scripts' networks/convert_hunyuan_image_lora_to_comfy.py: its names, ComfyUI's.
COMFY_PAIRS = [
    ("double_blocks_3_img_mlp_fc1", "double_blocks_3_img_mlp_0"),
    ("double_blocks_3_img_mlp_fc2", "double_blocks_3_img_mlp_2"),
    ("double_blocks_3_img_mod_linear", "double_blocks_3_img_mod_lin"),
    ("double_blocks_3_txt_mlp_fc1", "double_blocks_3_txt_mlp_0"),
    ("double_blocks_3_txt_mlp_fc2", "double_blocks_3_txt_mlp_2"),
    ("double_blocks_3_txt_mod_linear", "double_blocks_3_txt_mod_lin"),
    ("single_blocks_3_modulation_linear", "single_blocks_3_modulation_lin"),
    ("double_blocks_3_img_attn_qkv", "double_blocks_3_img_attn_qkv"),
    ("single_blocks_3_linear1", "single_blocks_3_linear1"),
]


@pytest.mark.parametrize(("native", "comfy"), COMFY_PAIRS)
def test_hunyuan_image_in_comfyui(native: str, comfy: str) -> None:
    (_, site), *others = FAMILIES["hunyuan-image"].unet.find(native)
    assert not others
    assert flat(site.path("comfy") or "") == comfy
    assert [found for _, found in FAMILIES["hunyuan-image"].unet.find(comfy)] == [site]


def test_hunyuan_models_share_what_a_converter_checks() -> None:
    """Diffusers converts published HunyuanVideo only, so the others are told by their difference."""
    video, image, video_15 = (
        {(rule.native, rule.diffusers) for rule in FAMILIES[name].unet.rules}
        for name in ("hunyuan-video", "hunyuan-image", "hunyuan-video-1.5")
    )
    pairs = {(native, *diffusers) for native, diffusers in (image | video_15) - video}
    assert pairs == {
        *((f"byt5_in.fc{number}", f"context_embedder_2.linear_{number}") for number in (1, 2, 3)),
        ("byt5_in.layernorm", "context_embedder_2.norm"),
        *(
            (f"{name}_in.mlp.{2 * layer}", f"{embedder}.linear_{layer + 1}")
            for layer in (0, 1)
            for name, embedder in (
                ("time", "time_guidance_embed.timestep_embedder"),
                ("time_r", "time_guidance_embed.timestep_embedder_r"),
                ("guidance", "time_guidance_embed.guidance_embedder"),
                ("time", "time_embed.timestep_embedder"),
                ("time_r", "time_embed.timestep_embedder_r"),
            )
        ),
        ("cond_type_embedding", "cond_type_embed"),
        ("vision_in.proj.0", "image_embedder.norm_in"),
        ("vision_in.proj.1", "image_embedder.linear_1"),
        ("vision_in.proj.3", "image_embedder.linear_2"),
        ("vision_in.proj.4", "image_embedder.norm_out"),
        *(
            (f"double_blocks.{{}}.img_attn_{name}", f"transformer_blocks.{{}}.attn.to_{name}")
            for name in "qkv"
        ),
        *(
            (f"double_blocks.{{}}.txt_attn_{name}", f"transformer_blocks.{{}}.attn.add_{name}_proj")
            for name in "qkv"
        ),
    }
