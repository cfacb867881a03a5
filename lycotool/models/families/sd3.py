"""Stable Diffusion 3 and 3.5; the second attention and the norms of queries are of 3.5."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.rules import renamed, under
from lycotool.models.families.table import ModuleTable, Rule
from lycotool.models.families.text_encoders import clip, t5


def _attention(native: str, diffusers: str) -> Iterator[Rule]:
    parts = (f"{diffusers}.to_q", f"{diffusers}.to_k", f"{diffusers}.to_v")
    yield Rule(f"{native}.qkv", parts, (1, 1, 1))
    yield from renamed(
        {
            f"{native}.ln_q": f"{diffusers}.norm_q",
            f"{native}.ln_k": f"{diffusers}.norm_k",
            f"{native}.proj": f"{diffusers}.to_out.0",
        }
    )


def _block() -> Iterator[Rule]:
    yield from _attention("x_block.attn", "attn")
    yield from _attention("x_block.attn2", "attn2")
    yield Rule("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), (1, 1, 1))
    yield Rule(
        "context_block.adaLN_modulation.1",
        ("norm1_context.linear",),
        swaps_halves=True,
        swaps_only_at_ratio=2,  # six times as high as wide, but in the last block
    )
    yield from renamed(
        {
            "x_block.adaLN_modulation.1": "norm1.linear",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        }
    )


def _rules() -> Iterator[Rule]:
    yield from renamed(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    )
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True)
    yield from under("joint_blocks.{}.", "transformer_blocks.{}.", _block())


SD3 = Family(
    name="SD 3",
    unet=ModuleTable(_rules),
    text_encoders={
        "te1": clip("lora_te1_", "text_encoder.", "clip_l"),
        "te2": clip("lora_te2_", "text_encoder_2.", "clip_g"),
        "te3": t5("lora_te3_", "text_encoder_3."),
    },
    kohya="native",
    diffusers_prefix="transformer.",
    marks=("joint_blocks_", "pos_embed_proj"),
    blocks=(("joint_blocks_{}_", "B{:02d}"),),
    metadata=("stable-diffusion-3", "sd3"),
)
