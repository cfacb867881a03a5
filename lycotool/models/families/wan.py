"""Wan 2.1 and 2.2: text to video, image to video, VACE."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule


def _attention(native: str, diffusers: str) -> Iterator[Rule]:
    yield from renamed(
        {
            f"{native}.q": f"{diffusers}.to_q",
            f"{native}.k": f"{diffusers}.to_k",
            f"{native}.v": f"{diffusers}.to_v",
            f"{native}.o": f"{diffusers}.to_out.0",
            f"{native}.norm_q": f"{diffusers}.norm_q",
            f"{native}.norm_k": f"{diffusers}.norm_k",
        }
    )


def _block() -> Iterator[Rule]:
    yield from _attention("self_attn", "attn1")
    yield from _attention("cross_attn", "attn2")
    yield from renamed(
        {
            "cross_attn.k_img": "attn2.add_k_proj",
            "cross_attn.v_img": "attn2.add_v_proj",
            "cross_attn.norm_k_img": "attn2.norm_added_k",
            "norm3": "norm2",  # the one norm with weights, third natively and second in diffusers
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
        }
    )


def _rules() -> Iterator[Rule]:
    yield from same("patch_embedding", "vace_patch_embedding")
    yield from renamed(
        {
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
            "head.head": "proj_out",
        }
    )
    yield from under("blocks.{}.", "blocks.{}.", _block())
    yield from under("vace_blocks.{}.", "vace_blocks.{}.", _block())
    yield from renamed(
        {
            "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
            "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
        }
    )


WAN = Family(
    name="Wan",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="native",
    diffusers_prefix="transformer.",
    marks=("_ffn_0", "_ffn_2", "_ffn_net_"),
    blocks=(("blocks_{}_", "B{:02d}"), ("vace_blocks_{}_", "V{:02d}")),
    metadata=("wan",),
    base_model_version="wan",
    model_spec="wan2.1/lora",
)
