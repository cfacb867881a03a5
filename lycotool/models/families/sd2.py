"""Stable Diffusion 2."""

from __future__ import annotations

from lycotool.models.families.base import Family
from lycotool.models.families.sd1 import UNET
from lycotool.models.families.sd_unet import BLOCKS
from lycotool.models.families.text_encoders import clip

SD2 = Family(
    name="SD 2.x",
    unet=UNET,
    text_encoders={"te1": clip("lora_te_", "text_encoder.", "clip_h")},
    kohya="diffusers",
    diffusers_prefix="unet.",
    blocks=BLOCKS,
    metadata=("stable-diffusion-v2", "sd_v2", "sd_2"),
    base_model_version="sd_v2",
    model_spec="stable-diffusion-v2-512/lora",
)
