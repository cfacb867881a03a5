"""What Flux.1, Chroma and Flux.2 have in common."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.rules import renamed
from lycotool.models.families.table import Rule

#: sd-webui-lora-block-weight's names: the double blocks, the single blocks, both ends.
BLOCKS = (
    ("double_blocks_{}_", "D{:02d}"),
    ("single_blocks_{}_", "S{:02d}"),
    ("img_in", "IN"),
    ("txt_in", "IN"),
    ("time_in_", "IN"),
    ("vector_in_", "IN"),
    ("guidance_in_", "IN"),
    ("final_layer_", "OUT"),
)


def double_attention() -> Iterator[Rule]:
    """The two attentions of a double block."""
    yield Rule("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1))
    yield Rule("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), (1, 1, 1))
    yield from renamed(
        {
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "txt_attn.proj": "attn.to_add_out",
        }
    )


def double_feed_forward() -> tuple[Rule, ...]:
    """The two feed-forwards of a double block of Flux.1 and Chroma."""
    return renamed(
        {
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        }
    )


def single_block() -> Iterator[Rule]:
    """A single block of Flux.1 and Chroma; the feed-forward is four times the width."""
    yield Rule("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4))
    yield from renamed(
        {"linear2": "proj_out", "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
    )


def embedder(native: str, diffusers: str) -> tuple[Rule, ...]:
    """The two layers of an embedder of time, guidance or pooled text."""
    return renamed(
        {f"{native}.in_layer": f"{diffusers}.linear_1", f"{native}.out_layer": f"{diffusers}.linear_2"}
    )
