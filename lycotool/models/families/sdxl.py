"""Stable Diffusion XL, the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lycotool.models.families.base import Family
from lycotool.models.families.rules import renamed
from lycotool.models.families.sd_unet import BLOCKS, PUBLISHED_RESNETS, unet_rules
from lycotool.models.families.table import ModuleTable, Rule
from lycotool.models.families.text_encoders import clip


def sdxl_rules(
    widths: Sequence[int] = (320, 640, 1280),
    attention: Sequence[bool] = (False, True, True),
    resnets: int = PUBLISHED_RESNETS,
) -> Iterator[Rule]:
    """The rules of an SDXL UNet; see :func:`lycotool.models.families.sd_unet.unet_rules`."""
    yield from unet_rules(widths, attention, transformer_block="{}", resnets=resnets)
    yield from renamed({"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"})


SDXL = Family(
    name="SDXL",
    unet=ModuleTable(sdxl_rules),
    text_encoders={
        "te1": clip("lora_te1_", "text_encoder.", "clip_l"),
        "te2": clip("lora_te2_", "text_encoder_2.", "clip_g"),
    },
    kohya="native",
    diffusers_prefix="unet.",
    # Any second transformer block: SD 1 and 2 have one in each attention.
    marks=(
        "_1_transformer_blocks_1_",
        "attentions_0_transformer_blocks_1_",
        "label_emb_0_",
        "add_embedding_",
    ),
    blocks=BLOCKS,
    metadata=("stable-diffusion-xl", "sdxl"),
    base_model_version="sdxl_base_v1-0",
    model_spec="stable-diffusion-xl-v1-base/lora",
)
