"""Flux.2: dev, and klein (without ``guidance_in``)."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.flux_blocks import BLOCKS, double_attention, embedder
from lycotool.models.families.rules import renamed, under
from lycotool.models.families.table import ModuleTable, Rule


def _double() -> Iterator[Rule]:
    yield from double_attention()
    yield from renamed(
        {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        }
    )


def _rules() -> Iterator[Rule]:
    yield from renamed(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
        }
    )
    yield from embedder("time_in", "time_guidance_embed.timestep_embedder")
    yield from embedder("guidance_in", "time_guidance_embed.guidance_embedder")
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True)
    yield from under("double_blocks.{}.", "transformer_blocks.{}.", _double())
    single = renamed(
        {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        }
    )
    yield from under("single_blocks.{}.", "single_transformer_blocks.{}.", single)


FLUX2 = Family(
    name="Flux.2",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="native",
    diffusers_prefix="transformer.",
    marks=("_stream_modulation_", "_attn_to_qkv_mlp_proj", "_ff_linear_", "_ff_context_linear_"),
    blocks=BLOCKS,
    metadata=("flux-2", "flux2", "flux_2", "Flux.2"),
    base_model_version="flux_2_dev",
    model_spec="Flux.2-dev/lora",
)
