"""Every layer of SD 1.x, SD 2.x and SDXL under every name it goes by.

The models are the real classes with real depth; their single files are named by
``makers.ldm_names``, a table independent of the package's own. A name is right when it leads
to the tensor (or the rows of one) that holds the module's weight.
"""

from functools import cache

import pytest
import torch
from makers import architectures as arch
from makers.ldm_names import StateDict
from torch import nn

from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex
from lycotool.models.naming import ModuleName, canonical, layer_kind, split_name, split_path, unet_kernel

FAMILIES = pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])


@cache
def single_file(family: str) -> StateDict:
    make = {"sd1": arch.sd1_single_file, "sd2": arch.sd2_single_file, "sdxl": arch.sdxl_single_file}
    return make[family](torch.float32)


@cache
def unet(family: str) -> nn.Module:
    return {"sd1": arch.sd1_unet, "sd2": arch.sd2_unet, "sdxl": arch.sdxl_unet}[family]()


@cache
def text_encoders(family: str) -> dict[str, nn.Module]:
    """The text encoders as diffusers has them, by the folder they are in."""
    if family == "sdxl":
        first, second = arch.sdxl_text_encoders()
        return {"text_encoder": first, "text_encoder_2": second}
    make = arch.sd1_text_encoder if family == "sd1" else arch.sd2_text_encoder
    return {"text_encoder": make()}


def kohya_prefix(family: str, folder: str) -> str:
    if family != "sdxl":
        return "lora_te_"
    return {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[folder]


def weights(model: nn.Module) -> StateDict:
    """Module path -> weight, norms and embeddings included."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(".weight")
    }


def encoder_weights(model: nn.Module) -> StateDict:
    """Without the projection, which OpenCLIP stores transposed."""
    return {path: tensor for path, tensor in weights(model).items() if path != "text_projection"}


def index_of(state: StateDict) -> LayerIndex:
    return LayerIndex({name: tuple(tensor.shape) for name, tensor in state.items()})


def tensor_at(layer: Layer, state: StateDict, part: str = "weight") -> torch.Tensor:
    param = layer.weight if part == "weight" else layer.bias
    assert param is not None
    tensor = state[param.key]
    found = tensor if param.rows is None else tensor[slice(*param.rows)]
    assert tuple(found.shape) == param.shape
    return found


def assert_found(index: LayerIndex, state: StateDict, names: dict[str, torch.Tensor]) -> None:
    """Every name leads to its tensor."""
    wrong = []
    for name, tensor in names.items():
        layer = index.find(name)
        if layer is None or not torch.equal(tensor_at(layer, state), tensor):
            wrong.append(name)
    assert not wrong
    assert names


# --- single files, by diffusers' names -----------------------------------------------------


@FAMILIES
def test_kohya_names_of_the_unet(family: str) -> None:
    state = single_file(family)
    names = {"lora_unet_" + path.replace(".", "_"): w for path, w in weights(unet(family)).items()}

    assert_found(index_of(state), state, names)


@FAMILIES
def test_kohya_names_of_the_text_encoders(family: str) -> None:
    """Of OpenCLIP's fused q, k and v each finds its rows."""
    state = single_file(family)
    names = {
        kohya_prefix(family, folder) + path.replace(".", "_"): w
        for folder, model in text_encoders(family).items()
        for path, w in encoder_weights(model).items()
    }

    assert_found(index_of(state), state, names)


@FAMILIES
def test_biases_go_with_their_weights(family: str) -> None:
    state = single_file(family)
    index = index_of(state)
    models = {"lora_unet_": unet(family)}
    models |= {kohya_prefix(family, folder): m for folder, m in text_encoders(family).items()}

    for prefix, model in models.items():
        own = model.state_dict()
        for path in encoder_weights(model):
            layer = index.find(prefix + path.replace(".", "_"))
            assert layer is not None
            if f"{path}.bias" in own:
                assert torch.equal(tensor_at(layer, state, "bias"), own[f"{path}.bias"])
            else:
                assert layer.bias is None


@FAMILIES
def test_diffusers_names(family: str) -> None:
    state = single_file(family)
    names = {f"unet.{path}": w for path, w in weights(unet(family)).items()}
    for folder, model in text_encoders(family).items():
        names |= {f"{folder}.{path}": w for path, w in encoder_weights(model).items()}

    assert_found(index_of(state), state, names)


@FAMILIES
def test_peft_names_without_a_component(family: str) -> None:
    state = single_file(family)
    names = {f"base_model.model.{path}": w for path, w in weights(unet(family)).items()}

    assert_found(index_of(state), state, names)


@FAMILIES
def test_lycoris_names_without_a_component(family: str) -> None:
    state = single_file(family)
    names = {"lycoris_" + path.replace(".", "_"): w for path, w in weights(unet(family)).items()}
    if family != "sdxl":
        encoder = text_encoders(family)["text_encoder"]
        names |= {"lycoris_" + path.replace(".", "_"): w for path, w in encoder_weights(encoder).items()}

    assert_found(index_of(state), state, names)


def test_a_name_without_a_component_may_fit_two_text_encoders() -> None:
    index = index_of(single_file("sdxl"))

    with pytest.raises(AmbiguousNameError, match=r"embedders\.0.* and .*embedders\.1"):
        index.find("lycoris_text_model_encoder_layers_3_mlp_fc1")
    deep = index.find("lycoris_text_model_encoder_layers_20_mlp_fc1")  # only the larger has so many
    assert deep is not None
    assert deep.weight.key == "conditioner.embedders.1.model.transformer.resblocks.20.mlp.c_fc.weight"


def test_a_transposed_projection_is_viewed_transposed() -> None:
    """OpenCLIP's ``text_projection`` is (in, out), an adapter's layer (out, in)."""
    state = single_file("sdxl")
    own = text_encoders("sdxl")["text_encoder_2"].state_dict()["text_projection.weight"]
    assert torch.equal(state["conditioner.embedders.1.model.text_projection"], own.T)

    layer = index_of(state).find("lora_te2_text_projection")
    assert layer is not None
    assert torch.equal(layer.weight.view(state[layer.weight.key]), own)
    assert layer.weight.shape == tuple(own.shape)


# --- single files, by their own names ------------------------------------------------------


def ldm_paths(state: StateDict) -> dict[str, torch.Tensor]:
    start = arch.UNET_PREFIX
    return {
        name.removeprefix(start).removesuffix(".weight"): tensor
        for name, tensor in state.items()
        if name.startswith(start) and name.endswith(".weight")
    }


@FAMILIES
@pytest.mark.parametrize(
    "prefix", ["lora_unet_", "oft_unet_", "lycoris_", "diffusion_model.", "model.diffusion_model."]
)
def test_names_of_the_files_own_unet(family: str, prefix: str) -> None:
    state = single_file(family)
    dotted = prefix.endswith(".")
    names = {
        prefix + (path if dotted else path.replace(".", "_")): tensor
        for path, tensor in ldm_paths(state).items()
    }

    assert_found(index_of(state), state, names)


@FAMILIES
def test_no_two_layers_of_a_file_share_a_place(family: str) -> None:
    names = [name.removesuffix(".weight") for name in single_file(family) if name.endswith(".weight")]

    assert len({split_path(name) for name in names}) == len(names)


# --- diffusers folders ---------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("style", ["diffusers", "ldm"])
def test_names_in_a_diffusers_folder(family: str, style: str) -> None:
    """Kohya's names for SDXL follow the single file, its names for SD 1 and 2 diffusers."""
    state = {f"unet.{name}": tensor for name, tensor in unet(family).state_dict().items()}
    for folder, model in text_encoders(family).items():
        state |= {f"{folder}.{name}": tensor for name, tensor in model.state_dict().items()}

    paths = weights(unet(family)) if style == "diffusers" else ldm_paths(single_file(family))
    names = {"lora_unet_" + path.replace(".", "_"): w for path, w in paths.items()}
    names |= {
        kohya_prefix(family, folder) + path.replace(".", "_"): w
        for folder, model in text_encoders(family).items()
        for path, w in weights(model).items()
    }

    assert_found(index_of(state), state, names)


# --- kernels -------------------------------------------------------------------------------


@FAMILIES
def test_a_kernel_told_by_a_path_is_the_layers(family: str) -> None:
    told = 0
    for path, tensor in weights(unet(family)).items():
        kernel = unet_kernel(canonical("unet", path.replace(".", "_")))
        if kernel is not None:
            assert kernel == tuple(tensor.shape[2:])
            told += 1
        else:  # proj_in and proj_out are 1x1 in SD 1 and linear in the others
            assert tuple(tensor.shape[2:]) in ((), (1, 1))
    assert told > 40


# --- other architectures -------------------------------------------------------------------

#: Real names of other models: dots, underscores and digits in all places.
OTHER_PATHS = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.18.txt_mod.lin",
    "single_blocks.37.linear1",
    "time_text_embed.timestep_embedder.linear_1",
    "transformer_blocks.0.img_mlp.net.0.proj",
    "joint_blocks.23.context_block.attn.qkv",
    "blocks.0.cross_attn.k_img",
    "blocks.29.ffn.0",
    "noise_refiner.1.attention.to_out.0",
    "llm_adapter.blocks.2.mlp.0",
    "layers.0.feed_forward.w1",
]


@pytest.mark.parametrize("stored", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize(
    "named",
    [
        "lora_unet_",
        "lora_transformer_",
        "lycoris_",
        "diffusion_model.",
        "transformer.",
        "",
        "base_model.model.",
    ],
)
def test_names_of_other_architectures(stored: str, named: str) -> None:
    """Found by their names alone, whichever prefixes the two files have."""
    index = LayerIndex({f"{stored}{path}.weight": (4, 4) for path in OTHER_PATHS})

    for path in OTHER_PATHS:
        name = named + (path if not named or named.endswith(".") else path.replace(".", "_"))
        layer = index.find(name)
        assert layer is not None, name
        assert layer.weight.key == f"{stored}{path}.weight"


@pytest.mark.parametrize("name", ["lora_unet_a_b_c", "diffusion_model.a.b_c"])
def test_underscores_that_fit_two_layers_are_refused(name: str) -> None:
    index = LayerIndex({"a.b_c.weight": (4, 4), "a_b.c.weight": (4, 4)})

    with pytest.raises(AmbiguousNameError, match=r"a\.b_c and a_b\.c"):
        index.find(name)


# --- taking names apart --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix", "component", "path"),
    [
        ("lora_unet_x_y", "lora_unet_", "unet", "x_y"),
        ("lora_unet__x", "lora_unet__", "unet", "x"),
        ("oft_unet_x", "oft_unet_", "unet", "x"),
        ("lora_te_x", "lora_te_", "te1", "x"),
        ("lora_te1_x", "lora_te1_", "te1", "x"),
        ("lora_te2_x", "lora_te2_", "te2", "x"),
        ("lora_te3_x", "lora_te3_", "te3", "x"),
        ("lora_transformer_x", "lora_transformer_", "unet", "x"),
        ("lora_prior_unet_x", "lora_prior_unet_", "unet", "x"),
        ("lycoris_x", "lycoris_", "any", "x"),
        ("unet.x.y", "unet.", "unet", "x.y"),
        ("transformer.x", "transformer.", "unet", "x"),
        ("text_encoder.x", "text_encoder.", "te1", "x"),
        ("text_encoder_2.x", "text_encoder_2.", "te2", "x"),
        ("text_encoder_3.x", "text_encoder_3.", "te3", "x"),
        ("text_encoders.clip_g.transformer.x", "text_encoders.clip_g.transformer.", "te2", "x"),
        ("base_model.model.x.y", "base_model.model.", "any", "x.y"),
        ("base_model.model.unet.x", "base_model.model.unet.", "unet", "x"),
        ("blocks.0.x", "", "any", "blocks.0.x"),
        ("x", "", "any", "x"),
    ],
)
def test_a_name_is_prefix_and_path(name: str, prefix: str, component: str, path: str) -> None:
    found = split_name(name)

    assert found == ModuleName(prefix, component, path)
    assert found.prefix + found.path == name
    assert found.is_dotted == ("." in name)


def test_the_text_models_own_level_does_not_matter() -> None:
    """Transformers 5 dropped ``text_model`` from CLIP's paths; all files have it."""
    with_level = split_name("lora_te_text_model_encoder_layers_0_mlp_fc1").place

    assert with_level == split_name("lora_te_encoder_layers_0_mlp_fc1").place


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_up_blocks_1_attentions_2_transformer_blocks_9_attn2_to_out_0", "attn2_to_out"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "attn1_to_q"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj", "ff_net_0_proj"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "conv1"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "conv"),
        ("lora_unet_conv_in", "conv_in"),
        ("lora_te1_text_model_encoder_layers_11_self_attn_q_proj", "self_attn_q_proj"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "mlp_fc1"),
        ("lora_unet_double_blocks_18_img_attn_qkv", "img_attn_qkv"),
        ("lora_unet_single_blocks_37_linear1", "linear1"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "attn_to_q"),
        ("diffusion_model.blocks.12.cross_attn.k_img", "cross_attn_k_img"),
        ("diffusion_model.joint_blocks.2.x_block.attn.qkv", "x_block_attn_qkv"),
        ("something.else", "something_else"),
    ],
)
def test_the_kind_of_a_layer_is_its_name_without_its_block(name: str, kind: str) -> None:
    assert layer_kind(name) == kind
