"""Z-Image. Native is the single file that ComfyUI reads, in Lumina's manner."""

from __future__ import annotations

from collections.abc import Iterator

from lycotool.models.families.base import Family
from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule


def _layer() -> Iterator[Rule]:
    yield Rule("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v"), (1, 1, 1))
    yield from renamed(
        {
            "attention.q_norm": "attention.norm_q",
            "attention.k_norm": "attention.norm_k",
            "attention.out": "attention.to_out.0",
        }
    )
    yield from same("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    yield from same("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


def _rules() -> Iterator[Rule]:
    yield from same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")
    yield from same("siglip_embedder.0", "siglip_embedder.1")
    # Patches of two by two pixels in one frame, as in every published model.
    yield from renamed(
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    )
    yield Rule("norm_final", ())  # published, but never used
    for stack in ("layers", "noise_refiner", "context_refiner", "siglip_refiner"):
        yield from under(f"{stack}.{{}}.", f"{stack}.{{}}.", _layer())
    yield from same("layers.{}.adaLN_modulation.0", "noise_refiner.{}.adaLN_modulation.0")


Z_IMAGE = Family(
    name="Z-Image",
    unet=ModuleTable(_rules),
    text_encoders={},
    kohya="diffusers",  # musubi-tuner's class has `to_q`, `to_k`, `to_v`; ComfyUI needs a conversion
    diffusers_prefix="transformer.",
    marks=("_adaLN_modulation_0", "_attention_to_", "_attention_norm_q", "all_x_embedder_", "siglip_"),
    blocks=(("layers_{}_", "B{:02d}"), ("noise_refiner_{}_", "N{:02d}"), ("context_refiner_{}_", "C{:02d}")),
    metadata=("Z-Image", "z_image", "zimage"),
    base_model_version="z_image",
    model_spec="Z-Image/lora",
)
