"""HunyuanVideo 1.5, which publishes queries, keys and values apart and has no single blocks.

ComfyUI fuses them; that no rule here says, and its name of `img_attn_q` is left as native.
"""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.hunyuan_blocks import (
    BLOCKS,
    double_block,
    embedder,
    ends,
    glyph_text,
    with_comfy_names,
)
from lycotool.models.families.rules import renamed
from lycotool.models.families.table import ModuleTable, Rule

_ATTENTION = renamed(
    {
        **{f"img_attn_{name}": f"attn.to_{name}" for name in "qkv"},
        **{f"txt_attn_{name}": f"attn.add_{name}_proj" for name in "qkv"},
    }
)


def _rules() -> Iterator[Rule]:
    return with_comfy_names(
        (
            *ends(),
            *glyph_text(),
            *embedder("time_in", "time_embed.timestep_embedder"),
            *embedder("time_r_in", "time_embed.timestep_embedder_r"),
            *renamed(
                {
                    "cond_type_embedding": "cond_type_embed",
                    "vision_in.proj.0": "image_embedder.norm_in",
                    "vision_in.proj.1": "image_embedder.linear_1",
                    "vision_in.proj.3": "image_embedder.linear_2",
                    "vision_in.proj.4": "image_embedder.norm_out",
                }
            ),
            *double_block(_ATTENTION),
        )
    )


HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo 1.5",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="native",
    diffusers_prefix="transformer.",
    marks=("_img_attn_v", "_txt_attn_v", "vision_in_proj_", "cond_type_embed"),
    blocks=BLOCKS[:1],
    metadata=("hunyuan-video-1.5", "hunyuan_video_1_5"),
    base_model_version="hunyuan_video_1_5",
    model_spec="hunyuan-video-1.5/lora",
)
