"""Flux.1: dev, schnell (without ``guidance_in``), Kontext, Fill."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.flux_blocks import (
    BLOCKS,
    double_attention,
    double_feed_forward,
    embedder,
    single_block,
)
from lycotool.models.families.rules import renamed, under
from lycotool.models.families.table import ModuleTable, Rule
from lycotool.models.families.text_encoders import clip, t5


def _double() -> Iterator[Rule]:
    yield from double_attention()
    yield from double_feed_forward()
    yield from renamed({"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"})


def _single() -> Iterator[Rule]:
    yield from single_block()
    yield from renamed({"modulation.lin": "norm.linear"})


def _rules() -> Iterator[Rule]:
    yield from renamed(
        {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    )
    yield from embedder("time_in", "time_text_embed.timestep_embedder")
    yield from embedder("vector_in", "time_text_embed.text_embedder")
    yield from embedder("guidance_in", "time_text_embed.guidance_embedder")
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True)
    yield from under("double_blocks.{}.", "transformer_blocks.{}.", _double())
    yield from under("single_blocks.{}.", "single_transformer_blocks.{}.", _single())


#: Without marks: each of its names is also Chroma's, Flux.2's or HunyuanVideo's in some naming.
FLUX1 = Family(
    name="Flux.1",
    unet=ModuleTable(_rules),
    text_encoders={
        "te1": clip("lora_te1_", "text_encoder.", "clip_l"),
        "te2": t5("lora_te3_", "text_encoder_2."),
    },
    kohya="native",
    diffusers_prefix="transformer.",
    partial=(("linear1_qkv", "linear1", 3),),  # XLabs' and ComfyUI's, without the feed-forward
    blocks=BLOCKS,
    metadata=("flux-1", "flux1", "Flux.1", "flux_kontext"),
    base_model_version="flux1",
    model_spec="flux-1-dev/lora",
)
