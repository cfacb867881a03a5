"""HunyuanImage 2.1: base, distilled (``guidance_in``, ``time_r_in``), refiner (without ByT5)."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.hunyuan_blocks import (
    BLOCKS,
    double_block,
    embedder,
    ends,
    fused_attention,
    glyph_text,
    single_block,
    with_comfy_names,
)
from lycotool.models.families.table import ModuleTable, Rule


def _rules() -> Iterator[Rule]:
    return with_comfy_names(
        (
            *ends(),
            *glyph_text(),
            *embedder("time_in", "time_guidance_embed.timestep_embedder"),
            *embedder("time_r_in", "time_guidance_embed.timestep_embedder_r"),
            *embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
            *double_block(fused_attention()),
            *single_block(),
        )
    )


HUNYUAN_IMAGE = Family(
    name="HunyuanImage 2.1",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="native",
    diffusers_prefix="transformer.",
    blocks=BLOCKS,
    metadata=("hunyuan-image",),
    base_model_version="hunyuan-image-2.1",
    model_spec="hunyuan-image-2.1/lora",
)
