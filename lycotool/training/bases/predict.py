"""One call for what the UNets of all families predict."""

from __future__ import annotations

from lycotool.lazy import torch
from lycotool.training.bases.eight_bit import rebuilt_for_gradients
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.text import Conditioning


def predict(
    base: BaseModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    size_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The UNet's prediction: noise or velocity, as ``base.prediction`` says.

    Parameters
    ----------
    noisy
        ``(B, 4, h, w)``, scaled latents with noise; cast to the UNet's dtype.
    timesteps
        ``(B,)``.
    size_ids
        ``(B, 6)``, SDXL only: original height and width, top and left of the crop, target
        height and width, in pixels.
    """
    dtype = base.unet_dtype
    conditioning = conditioning.to(dtype=dtype)
    added = None
    if base.family == "sdxl":
        if size_ids is None or conditioning.pooled is None:
            raise ValueError("SDXL needs size_ids and the pooled text")
        # The size ids stay in float32: bfloat16 has no 1001.
        added = {"text_embeds": conditioning.pooled, "time_ids": size_ids.float()}
    with rebuilt_for_gradients(base.unet):
        prediction: torch.Tensor = base.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    return prediction
