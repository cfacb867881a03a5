"""Options of noise and loss."""

from __future__ import annotations

from dataclasses import dataclass

from lycotool.training.declare import option
from lycotool.training.loss import HuberSchedule, LossType

_NOISE, _LOSS = "Noise", "Loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseOptions:
    """Which noise, at which times."""

    noise_offset: float = option(
        0.0, _NOISE, "Strength of a random shift of each channel.", kohya="noise_offset", minimum=0
    )
    noise_offset_random_strength: bool = option(
        False,
        _NOISE,
        "Draw that strength for each image, up to the given one.",
        kohya="noise_offset_random_strength",
    )
    adaptive_noise_scale: float | None = option(
        None,
        _NOISE,
        "Add this times the mean latent of a channel to its noise offset.",
        kohya="adaptive_noise_scale",
    )
    multires_noise_iterations: int = option(
        0,
        _NOISE,
        "Levels of multi-resolution noise; 0 is off.",
        kohya="multires_noise_iterations",
        unit="levels",
        minimum=0,
    )
    multires_noise_discount: float = option(
        0.3, _NOISE, "Factor on each coarser level.", kohya="multires_noise_discount", minimum=0
    )
    ip_noise_gamma: float = option(
        0.0,
        _NOISE,
        "Strength of noise added to the input alone (input perturbation).",
        kohya="ip_noise_gamma",
        minimum=0,
    )
    ip_noise_gamma_random_strength: bool = option(
        False,
        _NOISE,
        "Draw that strength for each image, up to the given one.",
        kohya="ip_noise_gamma_random_strength",
    )
    zero_terminal_snr: bool = option(
        False,
        _NOISE,
        "Rescale the noise schedule to end in pure noise; for v-prediction.",
        kohya="zero_terminal_snr",
    )
    min_timestep: int = option(
        0, _NOISE, "First time step that is drawn.", kohya="min_timestep", minimum=0, maximum=999
    )
    max_timestep: int = option(
        1000, _NOISE, "Time step before which drawing ends.", kohya="max_timestep", minimum=1, maximum=1000
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """How a prediction is judged."""

    loss_type: LossType = option("l2", _LOSS, "Loss of each element.", kohya="loss_type")
    huber_schedule: HuberSchedule = option(
        "snr", _LOSS, "How the threshold of huber and smooth_l1 follows the noise.", kohya="huber_schedule"
    )
    huber_c: float = option(0.1, _LOSS, "That threshold.", kohya="huber_c", minimum=1e-6)
    huber_scale: float = option(
        1.0,
        _LOSS,
        "Factor on it, for the schedules constant and exponential.",
        kohya="huber_scale",
        minimum=1e-6,
    )
    min_snr_gamma: float | None = option(
        None, _LOSS, "Min-SNR weighting with this γ; 5 is usual.", kohya="min_snr_gamma", minimum=0
    )
    debiased_estimation_loss: bool = option(
        False, _LOSS, "Debiased estimation weighting.", kohya="debiased_estimation_loss"
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False,
        _LOSS,
        "Weigh a v-prediction loss as that of the noise.",
        kohya="scale_v_pred_loss_like_noise_pred",
    )
    v_pred_like_loss: float | None = option(
        None,
        _LOSS,
        "Add the loss as v-prediction weighs it, times this.",
        kohya="v_pred_like_loss",
        minimum=0,
    )
