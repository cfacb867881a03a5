"""HunyuanVideo: text to video, image to video."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.hunyuan_blocks import (
    BLOCKS,
    double_block,
    embedder,
    ends,
    fused_attention,
    single_block,
    with_comfy_names,
)
from lycotool.models.families.rules import renamed
from lycotool.models.families.table import ModuleTable, Rule


def _rules() -> Iterator[Rule]:
    return with_comfy_names(
        (
            *ends(),
            *embedder("time_in", "time_text_embed.timestep_embedder"),
            *embedder("guidance_in", "time_text_embed.guidance_embedder"),
            *renamed(
                {
                    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                }
            ),
            *double_block(fused_attention()),
            *single_block(),
        )
    )


#: Without marks: HunyuanImage has its blocks, Flux.1 the rest of its names.
HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="native",
    diffusers_prefix="transformer.",
    blocks=BLOCKS,
    metadata=("hunyuan-video", "hunyuan_video"),
    base_model_version="hunyuan_video",
    model_spec="hunyuan-video/lora",
)
