"""One diffusion step as options ask for it: from latents to the model's input, target and loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.errors import UsageError
from lycotool.lazy import torch
from lycotool.training import loss as losses
from lycotool.training import noise as noises
from lycotool.training.diffusion_options import LossOptions, NoiseOptions
from lycotool.training.draws import Draws

if TYPE_CHECKING:
    from torch import Tensor


class Diffusion:
    """Noise schedule, noise and loss of a run. No randomness, no branch on a tensor's values.

    Parameters
    ----------
    alphas_cumprod
        ``ᾱ`` of all time steps, in float64.
    v_prediction
        Whether the model predicts velocity instead of noise.

    Raises
    ------
    UsageError
        If options contradict each other or the prediction type.
    """

    def __init__(
        self,
        noise: NoiseOptions,
        loss: LossOptions,
        alphas_cumprod: Tensor,
        *,
        v_prediction: bool,
        device: torch.device,
    ) -> None:
        check(noise, loss, v_prediction=v_prediction, ends_in_noise=bool(alphas_cumprod[-1] == 0))
        self.noise_options = noise
        self.loss_options = loss
        self.v_prediction = v_prediction
        self.alphas_cumprod = alphas_cumprod.to(torch.float32).to(device)

    def corrupt(self, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The noisy latents the model is given, and what it should predict; float32."""
        noise, options = draws.noise, self.noise_options
        if draws.offset is not None and draws.offset_strength is not None:
            adaptive = options.adaptive_noise_scale
            noise = noises.offset_noise(
                noise,
                draws.offset,
                draws.offset_strength,
                latents=None if adaptive is None else latents,
                adaptive=adaptive or 0.0,
            )
        if draws.pyramid is not None:
            noise = noises.multires_noise(noise, draws.pyramid)
        seen = noise
        if draws.perturbation is not None and draws.perturbation_strength is not None:
            seen = noises.input_perturbation(noise, draws.perturbation, draws.perturbation_strength)
        alpha_bar = self.alphas_cumprod[draws.timesteps]
        target = noises.velocity(latents, noise, alpha_bar) if self.v_prediction else noise
        return noises.add_noise(latents, seen, alpha_bar), target

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor, weights: Tensor) -> Tensor:
        """The weighted loss of every sample, ``(B,)``, float32.

        Parameters
        ----------
        weights
            ``(B,)``: 1, or the weight of a regularisation image.
        """
        options = self.loss_options
        alpha_bar = self.alphas_cumprod[timesteps]
        threshold = None
        if options.loss_type in ("huber", "smooth_l1"):
            threshold = losses.huber_threshold(
                options.huber_schedule,
                timesteps,
                alpha_bar,
                c=options.huber_c,
                scale=options.huber_scale,
                train_timesteps=len(self.alphas_cumprod),
            )
        each = losses.elementwise(prediction.float(), target, options.loss_type, threshold)
        return each.mean(dim=(1, 2, 3)) * weights * self._snr_weight(losses.snr(alpha_bar))

    def _snr_weight(self, ratio: Tensor) -> Tensor:
        options = self.loss_options
        weight = torch.ones_like(ratio)
        if options.min_snr_gamma:
            weight = weight * losses.min_snr_weight(
                ratio, options.min_snr_gamma, v_prediction=self.v_prediction
            )
        if options.scale_v_pred_loss_like_noise_pred:
            weight = weight * losses.noise_like_weight(ratio)
        if options.v_pred_like_loss:
            weight = weight * losses.v_like_weight(ratio, options.v_pred_like_loss)
        if options.debiased_estimation_loss:
            weight = weight * losses.debiased_weight(ratio, v_prediction=self.v_prediction)
        return weight


def check(noise: NoiseOptions, loss: LossOptions, *, v_prediction: bool, ends_in_noise: bool) -> None:
    """Refuse options that contradict the model.

    Raises
    ------
    UsageError
        Naming them.
    """
    check_noise(noise)
    if ends_in_noise and not v_prediction:
        raise UsageError(
            "a schedule that ends in pure noise teaches nothing there with epsilon prediction",
            hint="`--prediction v_prediction` if the model predicts velocity, else no `--zero-terminal-snr`",
        )
    if loss.scale_v_pred_loss_like_noise_pred and not v_prediction:
        raise UsageError("--scale-v-pred-loss-like-noise-pred is for models that predict velocity")
    if loss.v_pred_like_loss and v_prediction:
        raise UsageError("--v-pred-like-loss is for models that predict noise")


def check_noise(noise: NoiseOptions) -> None:
    """Refuse options of the noise that contradict each other, or that nothing would read.

    Raises
    ------
    UsageError
        Naming them.
    """
    if noise.min_timestep >= noise.max_timestep:
        raise UsageError(
            f"--min-timestep {noise.min_timestep} leaves no step before --max-timestep {noise.max_timestep}"
        )
    idle = (
        ("--noise-offset-random-strength", noise.noise_offset_random_strength, "--noise-offset", noise.noise_offset),
        ("--adaptive-noise-scale", noise.adaptive_noise_scale is not None, "--noise-offset", noise.noise_offset),
        ("--ip-noise-gamma-random-strength", noise.ip_noise_gamma_random_strength, "--ip-noise-gamma", noise.ip_noise_gamma),
    )  # fmt: skip
    for option, is_given, other, needed in idle:
        if is_given and not needed:
            raise UsageError(f"{option} does nothing without {other}")
