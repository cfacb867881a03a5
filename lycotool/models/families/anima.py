"""Anima: the transformer of Cosmos Predict 2, and an adapter for its language model."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule
from lycotool.models.families.text_encoders import decoder


def _attention(native: str, diffusers: str) -> Iterator[Rule]:
    yield from renamed(
        {
            f"{native}.q_proj": f"{diffusers}.to_q",
            f"{native}.k_proj": f"{diffusers}.to_k",
            f"{native}.v_proj": f"{diffusers}.to_v",
            f"{native}.output_proj": f"{diffusers}.to_out.0",
            f"{native}.q_norm": f"{diffusers}.norm_q",
            f"{native}.k_norm": f"{diffusers}.norm_k",
        }
    )


def _block() -> Iterator[Rule]:
    yield from _attention("self_attn", "attn1")
    yield from _attention("cross_attn", "attn2")
    yield from renamed({"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"})
    for module, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")):
        yield from renamed(
            {f"adaln_modulation_{module}.{number}": f"{norm}.linear_{number}" for number in (1, 2)}
        )


def _adapter() -> Iterator[Rule]:
    yield from same("embed", "in_proj", "out_proj", "norm")
    yield from same(*(f"blocks.{{}}.{norm}" for norm in ("norm_self_attn", "norm_cross_attn", "norm_mlp")))
    yield from same("blocks.{}.mlp.0", "blocks.{}.mlp.2")
    for attention in ("self_attn", "cross_attn"):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield from same(f"blocks.{{}}.{attention}.{module}")


def _rules() -> Iterator[Rule]:
    yield from renamed(
        {
            "x_embedder.proj.1": "patch_embed.proj",
            "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
            "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
            "t_embedding_norm": "time_embed.norm",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
            "final_layer.linear": "proj_out",
        }
    )
    yield from under("blocks.{}.", "transformer_blocks.{}.", _block())
    yield from under("llm_adapter.", "text_conditioner.", _adapter())


ANIMA = Family(
    name="Anima",
    unet=ModuleTable(_rules),
    text_encoders={"te1": decoder("lora_te_", "text_encoder.", "qwen3_06b")},
    kohya="native",
    diffusers_prefix="transformer.",
    beside=("text_conditioner.",),
    marks=(
        "llm_adapter_",
        "text_conditioner_",
        "_attn_output_proj",
        "_mlp_layer1",
        "_norm1_linear_1",
        "t_embedder_1_",
    ),
    blocks=(("blocks_{}_", "B{:02d}"), ("llm_adapter_blocks_{}_", "A{:02d}")),
    metadata=("anima",),
    base_model_version="anima",
    model_spec="anima-preview/lora",
)
