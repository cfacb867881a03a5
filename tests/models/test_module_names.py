"""The module names `extract` writes: those of sd-scripts and LyCORIS, and every one leads back.

Expected names come from the module paths of diffusers' and transformers' own classes, and
from adapter files that other programs wrote.
"""

from collections.abc import Callable
from functools import cache

import pytest
from helpers import DATA, GOLDEN
from makers import architectures as arch
from safetensors import safe_open
from torch import nn

from lycotool.models.layers import LayerIndex
from lycotool.models.module_names import KohyaNames
from lycotool.models.naming import split_name

FILES: dict[str, Callable[[], dict]] = {
    "SD1": arch.sd1_single_file,
    "SD2": arch.sd2_single_file,
    "SDXL": arch.sdxl_single_file,
}


@cache
def shapes(family: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in FILES[family]().items()}


#: Buffers and a number that stand beside the layers; no adapter has names for them.
NO_LAYERS = ("position_ids", "logit_scale")


@cache
def names(family: str) -> dict[str, str]:
    """Module name to layer path, of every layer outside the VAE."""
    places = LayerIndex(shapes(family)).places
    kohya = KohyaNames.of(component for component, _ in places)
    layers = [
        (component, layer.path)
        for (component, _), layer in places.items()
        if component not in ("vae", "any") and not layer.path.endswith(NO_LAYERS)
    ]
    found = {kohya.name(component, path): path for component, path in layers}
    assert len(found) == len(layers)
    return found


def modules(file: str) -> set[str]:
    with safe_open(file, "pt") as adapter:
        return {key.split(".")[0] for key in adapter.keys()}  # noqa: SIM118 - not a mapping


def flat_weights(model: nn.Module, prefix: str) -> set[str]:
    """sd-scripts' rule: the prefix, and the module's path with ``_`` for every dot."""
    paths = (name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight"))
    return {prefix + path.replace(".", "_") for path in paths}


@pytest.mark.parametrize("family", FILES)
def test_every_name_leads_back_to_its_layer(family: str) -> None:
    index = LayerIndex(shapes(family))
    for name, path in names(family).items():
        layer = index.find(name)
        assert layer is not None, name
        assert layer.path == path, name


@pytest.mark.parametrize("family", FILES)
def test_names_are_single_words_without_dots(family: str) -> None:
    assert all("." not in name for name in names(family))
    assert all(split_name(name).prefix for name in names(family))


def test_sd1_has_diffusers_and_transformers_names() -> None:
    expected = flat_weights(arch.sd1_unet(), "lora_unet_")
    expected |= flat_weights(arch.sd1_text_encoder(), "lora_te_")
    assert names("SD1").keys() == expected


@pytest.mark.parametrize("sample", ["loha", "lora"])
def test_sd1_has_every_name_of_the_sample_adapters(sample: str) -> None:
    written = modules(str(DATA / f"{sample}.safetensors"))
    assert len(written) == 354
    assert written <= names("SD1").keys()


@pytest.mark.parametrize("file", ["sd1_kohya_lora", "sd1_lycoris_tucker"])
def test_sd1_has_the_names_sd_scripts_and_lycoris_wrote(file: str) -> None:
    assert modules(str(GOLDEN / "convert" / f"{file}.safetensors")) <= names("SD1").keys()


def test_sd2_has_diffusers_and_transformers_names() -> None:
    expected = flat_weights(arch.sd2_unet(), "lora_unet_")
    expected |= flat_weights(arch.sd2_text_encoder(layers=24), "lora_te_")
    # The file also has a projection, which the text encoder as diffusers loads it has not.
    assert names("SD2").keys() == expected | {"lora_te_text_projection"}


def test_sdxl_unet_has_the_checkpoints_own_names() -> None:
    expected = {
        "lora_unet_" + key.removeprefix(arch.UNET_PREFIX).removesuffix(".weight").replace(".", "_")
        for key in shapes("SDXL")
        if key.startswith(arch.UNET_PREFIX) and key.endswith(".weight")
    }
    assert {name for name in names("SDXL") if name.startswith("lora_unet_")} == expected
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in expected


def test_sdxl_has_the_names_sd_scripts_wrote() -> None:
    assert modules(str(GOLDEN / "convert" / "sdxl_kohya_sgm.safetensors")) <= names("SDXL").keys()


def test_sdxl_text_encoders_have_transformers_names() -> None:
    """Also the second, whose single file is OpenCLIP's with q, k and v in one tensor."""
    first, second = arch.sdxl_text_encoders()
    found = names("SDXL")
    assert {name for name in found if name.startswith("lora_te1_")} == flat_weights(first, "lora_te1_")
    expected = flat_weights(second, "lora_te2_")
    written = {name for name in found if name.startswith("lora_te2_")}
    # OpenCLIP stores the transpose of the projection: a difference of it may have this name or none.
    assert written | {"lora_te2_text_projection"} == expected
    for letter in "qkv":
        assert f"lora_te2_text_model_encoder_layers_31_self_attn_{letter}_proj" in expected


def test_sdxl_fused_attention_gives_three_layers_of_one_tensor() -> None:
    index = LayerIndex(shapes("SDXL"))
    key = f"{arch.SDXL_CLIP_PREFIXES[1]}transformer.resblocks.7.attn.in_proj_weight"
    third = shapes("SDXL")[key][0] // 3
    rows = []
    for letter in "qkv":
        layer = index.find(f"lora_te2_text_model_encoder_layers_7_self_attn_{letter}_proj")
        assert layer is not None
        assert layer.weight.key == key
        rows.append(layer.weight.rows)
    assert rows == [(0, third), (third, 2 * third), (2 * third, 3 * third)]


@pytest.mark.parametrize(
    ("component", "path", "name"),
    [
        ("te2", "text_encoder_2.text_projection", "lora_te2_text_projection"),
        ("te2", "text_encoder_2.text_model.final_layer_norm", "lora_te2_text_model_final_layer_norm"),
        ("te1", "text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        # transformers 5 saves without the level `text_model`; sd-scripts' names have it.
        ("te1", "text_encoder.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ],
)  # fmt: skip
def test_text_encoders_of_an_sdxl_folder(component: str, path: str, name: str) -> None:
    assert KohyaNames.of(["unet", "te1", "te2"]).name(component, path) == name


def test_other_models_keep_their_own_paths() -> None:
    names = KohyaNames.of(["unet", "te1"])
    path = "model.diffusion_model.double_blocks.3.img_attn.qkv"
    assert names.name("unet", path) == "lora_unet_double_blocks_3_img_attn_qkv"
    assert KohyaNames.of(["any"]).name("any", "blocks.0.ffn.0") == "lora_unet_blocks_0_ffn_0"
    assert names.name("te3", "text_encoders.t5xxl.transformer.encoder.block.0") == "lora_te3_encoder_block_0"
