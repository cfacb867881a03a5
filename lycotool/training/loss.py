"""Losses of a diffusion step and their weights by noise level, as sd-scripts computes them.

The order is sd-scripts': elementwise loss, mean over a sample's elements, weight of the
sample (regularisation), weights by signal-to-noise ratio, mean over samples. Per-sample
numbers are ``(B,)``; ``snr = ᾱ / (1 - ᾱ)``. Sources: sd-scripts ``library/train_util.py``
(``conditional_loss``, ``get_huber_threshold_if_needed``), ``train_network.py``
(``post_process_loss``) and ``library/custom_train_functions.py`` at 48d368fa.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from lycotool.lazy import torch
from lycotool.training.noise import per_sample

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]

#: Where debiasing stops to trust the ratio, as in sd-scripts: it is infinite at step 0.
_LARGEST_SNR = 1000.0


def snr(alpha_bar: Tensor) -> Tensor:
    """``ᾱ / (1 - ᾱ)``."""
    return alpha_bar / (1 - alpha_bar)


def elementwise(prediction: Tensor, target: Tensor, kind: LossType, threshold: Tensor | None) -> Tensor:
    """The loss of every element.

    ``l2``: ``d²``; ``l1``: ``|d|``; ``huber``: ``2c(√(d² + c²) - c)``, which is ``d²`` near 0 and
    ``2c|d|`` far away; ``smooth_l1``: the same without the factor ``c``.

    Parameters
    ----------
    threshold
        ``c`` of every sample, ``(B,)``, for the last two.
    """
    difference = prediction - target
    if kind == "l2":
        return difference**2
    if kind == "l1":
        return difference.abs()
    if threshold is None:
        raise ValueError(kind)
    c = per_sample(threshold)
    rounded = 2 * ((difference**2 + c**2).sqrt() - c)
    return rounded * c if kind == "huber" else rounded


def huber_threshold(
    schedule: HuberSchedule,
    timesteps: Tensor,
    alpha_bar: Tensor,
    *,
    c: float,
    scale: float,
    train_timesteps: int = 1000,
) -> Tensor:
    """``c`` of every sample: constant, or falling as noise grows.

    ``constant``: ``c·scale``; ``exponential``: ``c^(t/T)·scale``; ``snr``: ``(1 - c)/(1 + σ)² + c`` with
    ``σ = √((1 - ᾱ)/ᾱ)``, which has no scale. Khrapov et al. 2024, "Improving Diffusion Models's
    Data-Corruption Resistance using Scheduled Pseudo-Huber Loss".
    """
    if schedule == "constant":
        return torch.full_like(alpha_bar, c * scale)
    if schedule == "exponential":
        return torch.exp(timesteps * (math.log(c) / train_timesteps)).to(alpha_bar.dtype) * scale
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    return (1 - c) / (1 + sigma) ** 2 + c


def min_snr_weight(ratio: Tensor, gamma: float, *, v_prediction: bool) -> Tensor:
    """``min(snr, γ)/snr`` for ε-prediction, ``min(snr, γ)/(snr + 1)`` for v-prediction.

    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy".
    """
    clipped = ratio.clamp_max(gamma)
    return clipped / (ratio + 1) if v_prediction else clipped / ratio


def debiased_weight(ratio: Tensor, *, v_prediction: bool) -> Tensor:
    """``1/√snr`` for ε-prediction, ``1/(snr + 1)`` for v-prediction, ``snr`` up to 1000.

    Source: Yu et al. 2024, "Unmasking Bias in Diffusion Model Training".
    """
    ratio = ratio.clamp_max(_LARGEST_SNR)
    return 1 / (ratio + 1) if v_prediction else ratio.rsqrt()


def noise_like_weight(ratio: Tensor) -> Tensor:
    """``snr/(snr + 1)``: what makes a v-prediction loss as large as that of the noise."""
    ratio = ratio.clamp_max(_LARGEST_SNR)
    return ratio / (ratio + 1)


def v_like_weight(ratio: Tensor, strength: float) -> Tensor:
    """``1 + strength·(snr + 1)/snr``: adds the loss as v-prediction would weigh it."""
    return 1 + strength / noise_like_weight(ratio)
