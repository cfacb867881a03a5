"""One canonical name for a layer, whichever program named it.

A layer is known by its component (``unet`` for any denoiser, ``te1`` to ``te3`` for text
encoders, ``vae``) and its path inside it with ``_`` for every dot. Two names mean the same
layer when their canonical forms agree, so underscores are never guessed back into dots.

Canonical is diffusers' and transformers' naming: the UNet of SD 1, SD 2 and SDXL is
translated from LDM/SGM naming, text encoders from OpenCLIP's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

#: The component of names without a known prefix.
ANY = "any"

#: Prefixes of adapter modules. First match wins, so longer ones stand first.
_ADAPTER_PREFIXES: tuple[tuple[str, str], ...] = (
    ("lora_unet__", "unet"),
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lora_prior_unet_", "unet"),
    ("lora_prior_te_", "te1"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te_", "te1"),
    ("lycoris_", ANY),
    ("lora_", ANY),
)

#: Prefixes of dotted names, in checkpoints and in dotted adapter dialects alike.
_DOTTED_PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("prior.", "unet"),
    ("cond_stage_model.transformer.", "te1"),
    ("cond_stage_model.model.", "te1"),
    ("conditioner.embedders.0.transformer.", "te1"),
    ("conditioner.embedders.0.model.", "te1"),
    ("conditioner.embedders.1.model.", "te2"),
    ("text_encoders.clip_l.transformer.", "te1"),
    ("text_encoders.clip_h.transformer.", "te1"),
    ("text_encoders.clip_g.transformer.", "te2"),
    ("text_encoders.t5xxl.transformer.", "te3"),
    ("text_encoder_3.", "te3"),
    ("text_encoder_2.", "te2"),
    ("text_encoder.", "te1"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class ModuleName:
    """An adapter module's name taken apart: ``prefix + path`` gives it back."""

    prefix: str
    component: str
    path: str

    @property
    def is_dotted(self) -> bool:
        """Whether the name keeps the model's dots (diffusers, PEFT, ComfyUI)."""
        return "." in self.prefix + self.path

    @property
    def place(self) -> tuple[str, str]:
        """Component and canonical path: equal for two names of one layer."""
        return self.component, canonical(self.component, flat(self.path))


@lru_cache(maxsize=2**15)
def split_name(name: str) -> ModuleName:
    """Take an adapter module's name apart."""
    if "." not in name:
        for prefix, component in _ADAPTER_PREFIXES:
            if name.startswith(prefix):
                return ModuleName(prefix, component, name.removeprefix(prefix))
    peft = _PEFT_PREFIX if name.startswith(_PEFT_PREFIX) else ""
    rest = name.removeprefix(peft)
    for prefix, component in _DOTTED_PREFIXES:
        if rest.startswith(prefix):
            return ModuleName(peft + prefix, component, rest.removeprefix(prefix))
    return ModuleName(peft, ANY, rest)


def split_path(path: str) -> tuple[str, str]:
    """Component and canonical path of a dotted path, such as a checkpoint key's."""
    for prefix, component in _DOTTED_PREFIXES:
        if path.startswith(prefix):
            return component, canonical(component, flat(path.removeprefix(prefix)))
    return ANY, canonical(ANY, flat(path))


def flat(path: str) -> str:
    """A dotted path with underscores, as kohya's and LyCORIS' module names have it."""
    return path.replace(".", "_")


#: Containers of layers with their numbers, outermost first: ``up_blocks_1_attentions_0_``.
_CONTAINERS = re.compile(
    r"(?:[a-z_]*?(?:blocks?|layers|resblocks|attentions|resnets|samplers|refiner)_(?:\d+_)+)+"
)


def layer_kind(name: str) -> str:
    """What a layer does, without where it is: equal for the same layer of all blocks.

    >>> layer_kind("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0")
    'attn2_to_out'
    """
    path = split_name(name).place[1]
    kind = _CONTAINERS.sub("", path, count=1) or path
    return kind.removesuffix("_0") if kind.endswith("to_out_0") else kind


@lru_cache(maxsize=2**15)
def canonical(component: str, path: str) -> str:
    """The canonical form of a flattened path inside a component."""
    if component in ("unet", ANY):
        path = _unet_to_diffusers(path)
    if component in ("te1", "te2", "te3", ANY):
        path = _openclip_to_hf(path).removeprefix("text_model_")
    return path


# --- SD 1.x, SD 2.x, SDXL: LDM/SGM names -> diffusers names --------------------------------

_UNET_TOP: Mapping[str, str] = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}

_RESNET: Mapping[str, str] = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}

_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)")
_MIDDLE = re.compile(r"middle_block_([012])_(.+)")


def _unet_to_diffusers(path: str) -> str:
    """Translate one LDM/SGM path; any other path is returned as it is."""
    if path in _UNET_TOP:
        return _UNET_TOP[path]
    if (match := _MIDDLE.fullmatch(path)) is not None:
        index, inner = int(match[1]), match[2]
        block = "attentions_0" if index == 1 else f"resnets_{index // 2}"
        return f"mid_block_{block}_{_RESNET.get(inner, inner)}"
    if (match := _BLOCK.fullmatch(path)) is None:
        return path
    side, number, inner = match[1], int(match[2]), match[4]
    if side == "input_blocks":
        level, position = divmod(number - 1, 3)
        if position == 2:
            return f"down_blocks_{level}_downsamplers_0_conv" if inner == "op" else path
        name = f"down_blocks_{level}"
    else:
        level, position = divmod(number, 3)
        if inner == "conv":  # after the resnet, and after the attention where there is one
            return f"up_blocks_{level}_upsamplers_0_conv"
        name = f"up_blocks_{level}"
    if match[3] == "0":
        return f"{name}_resnets_{position}_{_RESNET.get(inner, inner)}"
    return f"{name}_attentions_{position}_{inner}"


_CONVOLUTION = re.compile(r"(?:.*_)?(?:conv_in|conv_out|conv1|conv2|(?:down|up)samplers_0_conv)")


def unet_kernel(path: str) -> tuple[int, ...] | None:
    """The kernel of a UNet layer that its canonical path alone tells; None for unknown.

    Needed where an adapter stores a convolution flattened (LoHa, LoKr) and no base is given.
    """
    if _CONVOLUTION.fullmatch(path):
        return (3, 3)
    return (1, 1) if path.endswith("conv_shortcut") else None


# --- OpenCLIP text encoders -> transformers' names -----------------------------------------

_OPENCLIP_LAYER = re.compile(r"(?:transformer_)?resblocks_(\d+)_(.+)")

_OPENCLIP_INNER: Mapping[str, str] = {
    "attn_q_proj": "self_attn_q_proj",
    "attn_k_proj": "self_attn_k_proj",
    "attn_v_proj": "self_attn_v_proj",
    "attn_out_proj": "self_attn_out_proj",
    "mlp_c_fc": "mlp_fc1",
    "mlp_c_proj": "mlp_fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}

_OPENCLIP_TOP: Mapping[str, str] = {
    "ln_final": "final_layer_norm",
    "token_embedding": "embeddings_token_embedding",
    "positional_embedding": "embeddings_position_embedding",
}


def _openclip_to_hf(path: str) -> str:
    if (match := _OPENCLIP_LAYER.fullmatch(path)) is not None:
        inner = _OPENCLIP_INNER.get(match[2], match[2])
        return f"encoder_layers_{match[1]}_{inner}"
    return _OPENCLIP_TOP.get(path, path)
