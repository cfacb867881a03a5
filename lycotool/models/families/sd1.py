"""Stable Diffusion 1."""

from __future__ import annotations

from functools import partial

from lycotool.models.families.base import Family
from lycotool.models.families.sd_unet import BLOCKS, unet_rules
from lycotool.models.families.table import ModuleTable
from lycotool.models.families.text_encoders import clip

#: Also the table of SD 2, whose UNet differs in widths only.
UNET = ModuleTable(
    partial(unet_rules, (320, 640, 1280, 1280), (True, True, True, False), transformer_block="0")
)

SD1 = Family(
    name="SD 1.x",
    unet=UNET,
    text_encoders={"te1": clip("lora_te_", "text_encoder.", "clip_l")},
    kohya="diffusers",
    diffusers_prefix="unet.",
    pointwise=("_proj_in", "_proj_out"),
    blocks=BLOCKS,
    metadata=("stable-diffusion-v1", "sd_v1", "sd_1"),
    base_model_version="sd_v1",
    model_spec="stable-diffusion-v1/lora",
)
