"""Lumina-Image 2.0."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule
from lycotool.models.families.text_encoders import decoder


def _layer() -> Iterator[Rule]:
    # 24 heads for the queries, 8 for keys and values: 2304, 768 and 768 rows.
    yield Rule("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), (3, 1, 1))
    yield from renamed(
        {
            "attention.q_norm": "attn.norm_q",
            "attention.k_norm": "attn.norm_k",
            "attention.out": "attn.to_out.0",
            "feed_forward.w1": "feed_forward.linear_1",
            "feed_forward.w2": "feed_forward.linear_2",
            "feed_forward.w3": "feed_forward.linear_3",
            "attention_norm2": "norm2",
        }
    )
    yield from same("ffn_norm1", "ffn_norm2")


_ADAPTIVE_NORM = renamed({"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"})

_PLAIN_NORM = renamed({"attention_norm1": "norm1"})


def _rules() -> Iterator[Rule]:
    yield from same("x_embedder")
    yield from renamed(
        {
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "cap_embedder.0": "time_caption_embed.caption_embedder.0",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        }
    )
    yield Rule("norm_final", ())  # published, but never used
    for stack, norm in (
        ("layers", _ADAPTIVE_NORM),
        ("noise_refiner", _ADAPTIVE_NORM),
        ("context_refiner", _PLAIN_NORM),
    ):
        yield from under(f"{stack}.{{}}.", f"{stack}.{{}}.", (*_layer(), *norm))


LUMINA2 = Family(
    name="Lumina 2",
    unet=ModuleTable(_rules),
    text_encoders={"te1": decoder("lora_te_", "text_encoder.", "gemma2_2b")},
    kohya="native",
    diffusers_prefix="transformer.",
    marks=("layers_0_adaLN_modulation_1", "noise_refiner_0_adaLN_modulation_1", "_feed_forward_linear_"),
    blocks=(("layers_{}_", "B{:02d}"), ("noise_refiner_{}_", "N{:02d}"), ("context_refiner_{}_", "C{:02d}")),
    metadata=("lumina-2", "lumina2"),
    base_model_version="lumina2",
    model_spec="lumina-2/lora",
)
