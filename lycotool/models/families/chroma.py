"""Chroma: Flux.1 schnell with one network in place of all modulation layers."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.flux_blocks import BLOCKS, double_attention, double_feed_forward, single_block
from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule
from lycotool.models.families.text_encoders import t5


def _guidance() -> Iterator[Rule]:
    yield from same("in_proj", "out_proj", "norms.{}")
    yield from renamed(
        {"layers.{}.in_layer": "layers.{}.linear_1", "layers.{}.out_layer": "layers.{}.linear_2"}
    )


def _rules() -> Iterator[Rule]:
    yield from renamed(
        {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    )
    yield from under("distilled_guidance_layer.", "distilled_guidance_layer.", _guidance())
    double = (*double_attention(), *double_feed_forward())
    yield from under("double_blocks.{}.", "transformer_blocks.{}.", double)
    yield from under("single_blocks.{}.", "single_transformer_blocks.{}.", single_block())


CHROMA = Family(
    name="Chroma",
    unet=ModuleTable(_rules),
    text_encoders={"te1": t5("lora_te3_", "text_encoder.")},
    kohya="native",
    diffusers_prefix="transformer.",
    marks=("distilled_guidance_layer_",),
    blocks=BLOCKS,
    metadata=("chroma",),
    base_model_version="chroma",
    model_spec="chroma/lora",
)
