"""The published base models at their real size on the meta device: structure without weights."""

from __future__ import annotations

from functools import lru_cache

import torch

from lycotool.training.bases import build, configs
from lycotool.training.bases.configs import FamilyName
from lycotool.training.bases.detect import Predicts
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.schedule import alphas_cumprod


@lru_cache
def published_base(family: FamilyName) -> BaseModel:
    config = configs.published(family)
    return BaseModel(
        path=family,
        family=family,
        predicts=Predicts("epsilon", "a test"),
        unet=build.empty_unet(config["unet"], path=family),
        vae=None,
        text_encoders=[
            build.empty_text_encoder(own, has_projection=number > 0, path=family)
            for number, own in enumerate(config["text_encoders"])
        ],
        unet_table=configs.unet_table(family, config["unet"]),
        latent_scale=1.0,
        base_alphas=alphas_cumprod(),
        unet_dtype=torch.float32,
        vae_dtype=torch.float32,
        te_dtype=torch.float32,
        device=torch.device("meta"),
    )
