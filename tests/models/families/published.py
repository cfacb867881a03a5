"""The published denoisers in diffusers' classes, without weights and with few blocks.

The widths are the published ones, because the heights of fused parts depend on them; the
meta device makes them free.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import diffusers
import torch

from lycotool.models.families import FAMILIES
from lycotool.models.families.table import Site


def _model(class_name: str, **config: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(diffusers, class_name)(**config)


def _unet(
    widths: tuple[int, ...], attention: tuple[bool, ...], **config: Any
) -> Callable[[], torch.nn.Module]:
    return _model(
        "UNet2DConditionModel",
        block_out_channels=widths,
        down_block_types=[f"{'CrossAttn' * has}DownBlock2D" for has in attention],
        up_block_types=[f"{'CrossAttn' * has}UpBlock2D" for has in attention[::-1]],
        **config,
    )


class _Anima(torch.nn.Module):
    """diffusers has the adapter as a component of its own, beside the transformer."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        transformer = diffusers.CosmosTransformer3DModel(
            in_channels=16, num_attention_heads=16, num_layers=2, extra_pos_embed_type=None
        )
        for name, module in transformer.named_children():
            self.add_module(name, module)
        self.text_conditioner = diffusers.AnimaTextConditioner(num_layers=2, model_dim=model_dim)


_SD_WIDTHS, _SD_ATTENTION = (320, 640, 1280, 1280), (True, True, True, False)
_BLOCKS = {"num_layers": 2}
_BOTH = {"num_layers": 2, "num_single_layers": 2}

#: Family and variant -> a function that builds the model.
MODELS: Mapping[tuple[str, str], Callable[[], torch.nn.Module]] = {
    ("sd1", ""): _unet(_SD_WIDTHS, _SD_ATTENTION, cross_attention_dim=768, attention_head_dim=8),
    ("sd2", ""): _unet(
        _SD_WIDTHS,
        _SD_ATTENTION,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    ),
    ("sdxl", ""): _unet(
        _SD_WIDTHS[:3],
        (False, True, True),
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 10],
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    ("sd3", "3"): _model(
        "SD3Transformer2DModel", num_attention_heads=24, caption_projection_dim=1536, **_BLOCKS
    ),
    ("sd3", "3.5 large"): _model(
        "SD3Transformer2DModel",
        num_attention_heads=38,
        caption_projection_dim=2432,
        qk_norm="rms_norm",
        **_BLOCKS,
    ),
    ("sd3", "3.5 medium"): _model(
        "SD3Transformer2DModel",
        num_attention_heads=24,
        caption_projection_dim=1536,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
        **_BLOCKS,
    ),
    ("flux1", "dev"): _model("FluxTransformer2DModel", guidance_embeds=True, **_BOTH),
    ("flux1", "schnell"): _model("FluxTransformer2DModel", **_BOTH),
    ("chroma", ""): _model("ChromaTransformer2DModel", **_BOTH),
    ("flux2", "dev"): _model("Flux2Transformer2DModel", **_BOTH),
    ("flux2", "klein 4b"): _model(
        "Flux2Transformer2DModel",
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
        **_BOTH,
    ),
    ("wan", "t2v 1.3b"): _model("WanTransformer3DModel", num_attention_heads=12, ffn_dim=8960, **_BLOCKS),
    ("wan", "i2v 14b"): _model(
        "WanTransformer3DModel", in_channels=36, image_dim=1280, added_kv_proj_dim=5120, **_BLOCKS
    ),
    ("wan", "first and last frame"): _model(
        "WanTransformer3DModel",
        in_channels=36,
        image_dim=1280,
        added_kv_proj_dim=5120,
        pos_embed_seq_len=514,
        **_BLOCKS,
    ),
    ("wan", "vace"): _model(
        "WanVACETransformer3DModel", image_dim=1280, added_kv_proj_dim=5120, vace_layers=[0, 1], **_BLOCKS
    ),
    ("qwen-image", ""): _model("QwenImageTransformer2DModel", **_BLOCKS),
    ("qwen-image", "layered"): _model("QwenImageTransformer2DModel", use_additional_t_cond=True, **_BLOCKS),
    ("z-image", "turbo"): _model("ZImageTransformer2DModel", n_layers=2),
    ("z-image", "omni"): _model("ZImageTransformer2DModel", n_layers=2, siglip_feat_dim=1152),
    ("lumina2", ""): _model("Lumina2Transformer2DModel", **_BLOCKS),
    ("anima", ""): lambda: _Anima(model_dim=1024),
    ("anima", "another width"): lambda: _Anima(model_dim=512),
    ("hunyuan-video", "t2v"): _model("HunyuanVideoTransformer3DModel", **_BOTH),
    ("hunyuan-video", "i2v"): _model(
        "HunyuanVideoTransformer3DModel", image_condition_type="token_replace", guidance_embeds=False, **_BOTH
    ),
    ("hunyuan-video-1.5", ""): _model("HunyuanVideo15Transformer3DModel", **_BLOCKS),
    ("hunyuan-video-1.5", "distilled"): _model(
        "HunyuanVideo15Transformer3DModel", use_meanflow=True, **_BLOCKS
    ),
    ("hunyuan-image", "base"): _model("HunyuanImageTransformer2DModel", text_embed_2_dim=1472, **_BOTH),
    ("hunyuan-image", "distilled"): _model(
        "HunyuanImageTransformer2DModel",
        text_embed_2_dim=1472,
        guidance_embeds=True,
        use_meanflow=True,
        **_BOTH,
    ),
}


@lru_cache
def parameter_shapes(family: str, variant: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the parameters of every module that has any, by module and own name."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of Chroma's class
        model = MODELS[family, variant]()
    return {
        path: {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def variants_of(family: str) -> list[str]:
    return [variant for name, variant in MODELS if name == family]


def sites(family: str, variant: str) -> Iterator[tuple[str, Site]]:
    """The modules that rules cover, and their sites."""
    for path in parameter_shapes(family, variant):
        for _, site in FAMILIES[family].unet.find(path):
            yield path, site
