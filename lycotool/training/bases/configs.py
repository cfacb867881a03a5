"""The configs that diffusers' and transformers' classes are built from.

The published models' are data beside this file. A single file holds no config, so what its
tensors' shapes tell is put over the published values: for a published model that changes
nothing, and it makes room for others of the same design. What shapes do not tell follows
the published models' rule: 8 heads in SD 1's UNet, heads of 64 channels everywhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, Literal

from lycotool.models.families.sd_unet import unet_rules
from lycotool.models.families.sdxl import sdxl_rules
from lycotool.models.families.table import ModuleTable

FamilyName = Literal["sd1", "sd2", "sdxl"]
Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

_HEAD_CHANNELS = 64


def published(family: FamilyName) -> dict[str, Any]:
    """``unet``, ``vae`` and ``text_encoders`` (a list) of a published model."""
    text = resources.files(__package__).joinpath(f"configs/{family}.json").read_text("utf-8")
    configs: dict[str, Any] = json.loads(text)
    return configs


def unet_config(family: FamilyName, shapes: Shapes) -> Config:
    """The UNet's config, given the shapes of its tensors under LDM's names without prefix."""
    config: Config = published(family)["unet"]
    downsamplers = _numbers(r"input_blocks\.(\d+)\.0\.op\.weight", shapes)
    if not downsamplers:
        return config
    resnets = downsamplers[0] - 1
    firsts = [1 + level * (resnets + 1) for level in range(len(downsamplers) + 1)]
    widths = [_size(shapes, f"input_blocks.{at}.0.out_layers.3.weight", 0) for at in firsts]
    if not all(widths):
        return config
    depths = [
        len(_numbers(rf"input_blocks\.{at}\.1\.transformer_blocks\.(\d+)\.norm1\.weight", shapes))
        for at in firsts
    ]
    config |= {
        "block_out_channels": widths,
        "layers_per_block": resnets,
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "up_block_types": [f"{'CrossAttn' if depth else ''}UpBlock2D" for depth in reversed(depths)],
    }
    config["in_channels"] = _size(shapes, "input_blocks.0.0.weight", 1) or config["in_channels"]
    context = re.compile(r".*\.attn2\.to_k\.weight")
    config["cross_attention_dim"] = next(
        (shape[1] for key, shape in shapes.items() if context.fullmatch(key) and len(shape) == 2),
        config["cross_attention_dim"],
    )
    if family != "sd1":
        config["attention_head_dim"] = [_heads(width) for width in widths]
    if family == "sdxl":
        config["transformer_layers_per_block"] = [depth or 1 for depth in depths]
        vector = _size(shapes, "label_emb.0.0.weight", 1)
        config["projection_class_embeddings_input_dim"] = (
            vector or config["projection_class_embeddings_input_dim"]
        )
    return config


def with_pooled_width(unet: Config, pooled: int) -> Config:
    """SDXL's UNet config with the width of each of the six size embeddings.

    The added vector is the pooled text and six embeddings, and shapes tell its whole width.
    """
    return unet | {"addition_time_embed_dim": (unet["projection_class_embeddings_input_dim"] - pooled) // 6}


def vae_config(family: FamilyName, shapes: Shapes) -> Config:
    """The VAE's config, given the shapes of its tensors without prefix, in either naming."""
    config: Config = published(family)["vae"]
    widths = []
    for level in range(len(shapes)):
        first = _size(shapes, f"encoder.down.{level}.block.0.conv1.weight", 0) or _size(
            shapes, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0
        )
        if not first:
            break
        widths.append(first)
    if not widths:
        return config
    return config | {
        "block_out_channels": widths,
        "layers_per_block": len(
            _numbers(r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\.conv1\.weight", shapes)
        ),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": _size(shapes, "post_quant_conv.weight", 0) or config["latent_channels"],
    }


def clip_config(base: Config, shapes: Shapes) -> Config:
    """A CLIP text encoder's config, given shapes under transformers' names inside ``text_model.``."""
    vocabulary, width = shapes.get("embeddings.token_embedding.weight", (0, 0))
    layers = _numbers(r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight", shapes)
    if not width or not layers:
        return base
    return base | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _heads(width),
        "intermediate_size": _size(shapes, "encoder.layers.0.mlp.fc1.weight", 0) or base["intermediate_size"],
        "max_position_embeddings": _size(shapes, "embeddings.position_embedding.weight", 0)
        or base["max_position_embeddings"],
        "projection_dim": _size(shapes, "text_projection.weight", 0) or base["projection_dim"],
    }


def openclip_config(base: Config, shapes: Shapes, layers: int) -> Config:
    """A text encoder's config, given shapes in OpenCLIP's names and how many layers are used."""
    vocabulary, width = shapes.get("token_embedding.weight", (0, 0))
    if not width or layers < 1:
        return base
    return base | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width),
        "intermediate_size": _size(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 0)
        or base["intermediate_size"],
        "max_position_embeddings": _size(shapes, "positional_embedding", 0)
        or base["max_position_embeddings"],
        "projection_dim": _size(shapes, "text_projection", 1) or base["projection_dim"],
    }


def unet_table(family: FamilyName, config: Config) -> ModuleTable:
    """The modules of the UNet with this config, in both namings."""
    widths: Sequence[int] = config["block_out_channels"]
    attention = ["CrossAttn" in kind for kind in config["down_block_types"]]
    resnets = int(config["layers_per_block"])
    if family == "sdxl":
        return ModuleTable(partial(sdxl_rules, widths, attention, resnets))
    return ModuleTable(partial(unet_rules, widths, attention, "0", resnets))


def _heads(width: int) -> int:
    return max(1, width // _HEAD_CHANNELS)


def _numbers(pattern: str, keys: Shapes) -> list[int]:
    """The numbers that fill the pattern's group, in order."""
    compiled = re.compile(pattern)
    return sorted({int(match[1]) for key in keys if (match := compiled.fullmatch(key))})


def _size(shapes: Shapes, key: str, dim: int) -> int:
    """A tensor's size along a dimension; 0 where it has none."""
    shape = shapes.get(key, ())
    return shape[dim] if len(shape) > dim else 0
