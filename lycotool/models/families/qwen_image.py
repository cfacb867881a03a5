"""Qwen-Image, its Edit and its Layered models: published with diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.rules import same
from lycotool.models.families.table import ModuleTable, Rule


def _rules() -> Iterator[Rule]:
    yield from same("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out")
    yield from same(*(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)))
    yield from same("time_text_embed.addition_t_embedding")  # Layered
    attention = (
        *("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
    )
    yield from same(*(f"transformer_blocks.{{}}.attn.{module}" for module in attention))
    for stream in ("img", "txt"):
        for module in ("mod.1", "mlp.net.0.proj", "mlp.net.2"):
            yield from same(f"transformer_blocks.{{}}.{stream}_{module}")


QWEN_IMAGE = Family(
    name="Qwen-Image",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="diffusers",
    diffusers_prefix="transformer.",
    marks=("_img_mlp_net_", "_txt_mlp_net_", "_img_mod_1", "_txt_mod_1"),
    blocks=(("transformer_blocks_{}_", "B{:02d}"),),
    metadata=("Qwen-Image", "qwen_image"),
    base_model_version="qwen_image",
    model_spec="Qwen-Image/lora",
)
