"""Between pixels and latents."""

from __future__ import annotations

from lycotool.lazy import torch
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.residence import bring


def encode_images(base: BaseModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the VAE's posterior, unscaled, in float32.

    A latent for the UNet is ``(mean + std * noise) * base.latent_scale``.

    Parameters
    ----------
    pixels
        ``(B, 3, H, W)`` in [-1, 1].

    Returns
    -------
    mean, std
        Each ``(B, 4, H / 8, W / 8)`` for published models.
    """
    bring(base, base.vae)
    with torch.no_grad():
        posterior = base.vae.encode(pixels.to(base.device, base.vae_dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()


def decode_latents(base: BaseModel, latents: torch.Tensor) -> torch.Tensor:
    """Pixels ``(B, 3, H, W)`` in [-1, 1], in float32, of latents as the UNet has them (scaled)."""
    bring(base, base.vae)
    with torch.no_grad():
        unscaled = latents.to(base.device, base.vae_dtype) / base.latent_scale
        pixels: torch.Tensor = base.vae.decode(unscaled).sample
        return pixels.float().clamp(-1, 1)


def save_vae_memory(base: BaseModel, *, tiling: bool = False) -> None:
    """Let the VAE work on one image at a time, and with ``tiling`` on overlapping tiles of it.

    One image at a time gives the same values; tiles are blended where they overlap, so theirs
    differ a little.
    """
    base.vae.enable_slicing()
    if tiling:
        base.vae.enable_tiling()
