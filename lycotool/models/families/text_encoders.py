"""The text encoders, in transformers' naming; CLIP's also in OpenCLIP's."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import TextEncoder
from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule


def _clip() -> Iterator[Rule]:
    # OpenCLIP holds `in_proj_weight` and `in_proj_bias` as parameters of `attn`, and its
    # `positional_embedding` and `text_projection` are parameters too, the latter transposed.
    yield from renamed(
        {
            "token_embedding": "embeddings.token_embedding",
            "positional_embedding": "embeddings.position_embedding",
            "ln_final": "final_layer_norm",
        }
    )
    layer = (
        Rule("attn.in_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (1, 1, 1)),
        *renamed(
            {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }
        ),
    )
    yield from under("transformer.resblocks.{}.", "encoder.layers.{}.", layer)
    yield Rule(None, ("text_projection",))


#: OpenAI's CLIP-L, and OpenCLIP's H and G.
CLIP = ModuleTable(_clip)


def _t5() -> Iterator[Rule]:
    yield from same("shared", "encoder.embed_tokens", "encoder.final_layer_norm")
    block = (
        *(f"0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")),
        *(f"1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
        *(f"{layer}.layer_norm" for layer in (0, 1)),
    )
    yield from same(*(f"encoder.block.{{}}.layer.{module}" for module in block))


#: The encoders of T5, T5 1.1 and UMT5.
T5 = ModuleTable(_t5)


def _decoder() -> Iterator[Rule]:
    yield from same("embed_tokens", "norm")
    layer = (
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        *(f"{norm}_layernorm" for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    )
    yield from same(*(f"layers.{{}}.{module}" for module in layer))


#: Llama, Qwen 2 and 2.5, Qwen 3 (with norms of queries and keys), Gemma 2 (with two norms more).
DECODER = ModuleTable(_decoder)


def clip(kohya: str, diffusers: str, comfy: str) -> TextEncoder:
    """A CLIP text encoder; ``comfy`` is its name in ComfyUI."""
    prefix = f"text_encoders.{comfy}.transformer."
    return TextEncoder(CLIP, "text_model.", kohya, diffusers, prefix, beside=("text_projection",))


def t5(kohya: str, diffusers: str) -> TextEncoder:
    """The T5 XXL encoder."""
    return TextEncoder(T5, "", kohya, diffusers, "text_encoders.t5xxl.transformer.")


def decoder(kohya: str, diffusers: str, comfy: str) -> TextEncoder:
    """A language model; ComfyUI alone keeps its outer ``model.``."""
    return TextEncoder(DECODER, "", kohya, diffusers, f"text_encoders.{comfy}.transformer.model.")
