"""Noise and targets of a diffusion step, as sd-scripts computes them.

Every function is the formula alone: random numbers come in as arguments, drawn elsewhere.
Tensors are latents ``(B, C, H, W)``; per-sample numbers are ``(B,)``. ``ᾱ`` is
``alphas_cumprod``. Sources: sd-scripts ``library/train_util.py``
(``get_noise_noisy_latents_and_timesteps``) and ``library/custom_train_functions.py`` at
48d368fa; papers are named where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def per_sample(values: Tensor) -> Tensor:
    """``(B,)`` as ``(B, 1, 1, 1)``."""
    return values.view(-1, 1, 1, 1)


def offset_noise(
    noise: Tensor, normal: Tensor, strength: Tensor, *, latents: Tensor | None = None, adaptive: float = 0.0
) -> Tensor:
    """``noise + max(0, strength + adaptive·|mean latent|)·normal``, one number per channel.

    Parameters
    ----------
    normal
        ``(B, C, 1, 1)``, standard normal.
    strength
        ``(B,)``.
    latents
        Whose mean over pixels ``adaptive`` multiplies; without them the strength is not
        clamped either, as in sd-scripts.

    Notes
    -----
    Source: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    scale = per_sample(strength)
    if latents is not None:
        mean = latents.mean(dim=(2, 3), keepdim=True).abs()
        scale = (scale + adaptive * mean).clamp_min(0.0)
    return noise + scale * normal


def pyramid_sizes(height: int, width: int, factors: Sequence[float]) -> list[tuple[int, int]]:
    """Sizes of the levels of multi-resolution noise.

    ``factors[i]``, from 2 to 4, shrinks level ``i`` by its ``i``-th power; the first level of
    one pixel's height or width is the last.
    """
    sizes = []
    for level, factor in enumerate(factors):
        size = max(1, int(height / factor**level)), max(1, int(width / factor**level))
        sizes.append(size)
        if 1 in size:
            break
    return sizes


def pyramid(levels: Sequence[Tensor], height: int, width: int, discount: float) -> Tensor:
    """``Σᵢ discountⁱ · bilinear(levelᵢ)``, ``(B, C, height, width)``."""
    total = None
    for level, normal in enumerate(levels):
        whole = torch.nn.functional.interpolate(normal, size=(height, width), mode="bilinear")
        total = whole * discount**level if total is None else total + whole * discount**level
    if total is None:
        raise ValueError("no level")
    return total


def multires_noise(noise: Tensor, summed: Tensor) -> Tensor:
    """``noise + pyramid``, divided by its standard deviation in each sample.

    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training". sd-scripts
    takes the deviation over the whole batch; a sample then depends on what it is batched with.
    """
    total = noise + summed
    return total / total.std(dim=(1, 2, 3), keepdim=True)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``√ᾱ·x + √(1 - ᾱ)·ε``; ``alpha_bar`` is ``(B,)``. Ho et al. 2020, equation 4."""
    return per_sample(alpha_bar.sqrt()) * latents + per_sample((1 - alpha_bar).sqrt()) * noise


def velocity(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``√ᾱ·ε - √(1 - ᾱ)·x``, the target of v-prediction. Salimans and Ho 2022, appendix D."""
    return per_sample(alpha_bar.sqrt()) * noise - per_sample((1 - alpha_bar).sqrt()) * latents


def input_perturbation(noise: Tensor, normal: Tensor, strength: Tensor) -> Tensor:
    """``ε + γ·normal``, for the model's input alone: the target stays ``ε``.

    Source: Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models".
    """
    return noise + per_sample(strength) * normal
