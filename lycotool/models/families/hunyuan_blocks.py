"""What HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from lycotool.models.families.rules import renamed, under
from lycotool.models.families.table import Rule

#: ComfyUI runs these models in its Flux class, whose names it gives them.
_COMFY_NAMES = (
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_mod.linear", "_mod.lin"),
    (".modulation.linear", ".modulation.lin"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
)

BLOCKS = (("double_blocks_{}_", "D{:02d}"), ("single_blocks_{}_", "S{:02d}"))


def with_comfy_names(rules: Iterable[Rule]) -> Iterator[Rule]:
    """The rules, with ComfyUI's name where it is another."""
    for rule in rules:
        name = rule.native or ""
        for native, comfy in _COMFY_NAMES:
            name = name.replace(native, comfy)
        yield replace(rule, comfy=name) if name != rule.native else rule


def embedder(native: str, diffusers: str) -> tuple[Rule, ...]:
    """The two layers of an embedder of time or guidance."""
    return renamed({f"{native}.mlp.0": f"{diffusers}.linear_1", f"{native}.mlp.2": f"{diffusers}.linear_2"})


def ends() -> Iterator[Rule]:
    """The first and the last layers, and the refiner of the text."""
    yield from renamed({"img_in.proj": "x_embedder.proj", "final_layer.linear": "proj_out"})
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True)
    yield from under("txt_in.", "context_embedder.", _text_refiner())


def _text_refiner() -> Iterator[Rule]:
    yield from embedder("t_embedder", "time_text_embed.timestep_embedder")
    yield from renamed(
        {
            "input_embedder": "proj_in",
            "c_embedder.linear_1": "time_text_embed.text_embedder.linear_1",
            "c_embedder.linear_2": "time_text_embed.text_embedder.linear_2",
        }
    )
    block = (
        Rule("self_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1)),
        *renamed(
            {
                "self_attn_proj": "attn.to_out.0",
                "norm1": "norm1",
                "norm2": "norm2",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "adaLN_modulation.1": "norm_out.linear",  # two gates, in the same order
            }
        ),
    )
    yield from under("individual_token_refiner.blocks.{}.", "token_refiner.refiner_blocks.{}.", block)


def fused_attention() -> Iterator[Rule]:
    """Queries, keys and values of a double block, where they are one matrix."""
    yield Rule("img_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1))
    yield Rule("txt_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), (1, 1, 1))


def double_block(attention: Iterable[Rule]) -> tuple[Rule, ...]:
    """A double block around its queries, keys and values."""
    rest = renamed(
        {
            "img_mod.linear": "norm1.linear",
            "img_attn_q_norm": "attn.norm_q",
            "img_attn_k_norm": "attn.norm_k",
            "img_attn_proj": "attn.to_out.0",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mod.linear": "norm1_context.linear",
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_attn_k_norm": "attn.norm_added_k",
            "txt_attn_proj": "attn.to_add_out",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
        }
    )
    return under("double_blocks.{}.", "transformer_blocks.{}.", (*attention, *rest))


def single_block() -> tuple[Rule, ...]:
    """A single block; the feed-forward is four times the width."""
    rules = (
        Rule("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)),
        *renamed(
            {
                "linear2": "proj_out",
                "q_norm": "attn.norm_q",
                "k_norm": "attn.norm_k",
                "modulation.linear": "norm.linear",
            }
        ),
    )
    return under("single_blocks.{}.", "single_transformer_blocks.{}.", rules)


def glyph_text() -> tuple[Rule, ...]:
    """The layers that read the second text encoder, ByT5."""
    return renamed(
        {
            "byt5_in.layernorm": "context_embedder_2.norm",
            **{f"byt5_in.fc{number}": f"context_embedder_2.linear_{number}" for number in (1, 2, 3)},
        }
    )
