"""What is drawn for the samples of a step: on the CPU, each a function of seed, step and sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.training import noise as formulas
from lycotool.training.diffusion_options import NoiseOptions
from lycotool.training.randomness import torch_generator, uniforms

if TYPE_CHECKING:
    from torch import Tensor

#: Index of all of them: step, sample of the step.
TIMESTEP = "timestep"
NOISE = "noise"
OFFSET = "noise offset"
OFFSET_STRENGTH = "noise offset strength"
PYRAMID = "multires noise"
PYRAMID_FACTORS = "multires noise factors"
PERTURBATION = "input perturbation"
PERTURBATION_STRENGTH = "input perturbation strength"


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of ``B`` samples; None where an option is off.

    Attributes
    ----------
    timesteps
        ``(B,)``, int64.
    noise, pyramid, perturbation
        ``(B, C, H, W)``.
    offset
        ``(B, C, 1, 1)``.
    offset_strength, perturbation_strength
        ``(B,)``.
    """

    timesteps: Tensor
    noise: Tensor
    offset: Tensor | None = None
    offset_strength: Tensor | None = None
    pyramid: Tensor | None = None
    perturbation: Tensor | None = None
    perturbation_strength: Tensor | None = None


def draw(
    options: NoiseOptions,
    shape: tuple[int, int, int],
    *,
    seed: int,
    step: int,
    first: int,
    count: int,
    stride: int = 1,
) -> Draws:
    """Draw for ``count`` samples of a step.

    Parameters
    ----------
    shape
        Channels, height and width of the latents.
    first
        The first sample's number in the step.
    stride
        From one number to the next: how many processes share the batch.
    """
    samples = [(step, first + stride * place) for place in range(count)]
    drawn: dict[str, Tensor] = {
        "timesteps": torch.tensor([_timestep(options, seed, index) for index in samples]),
        "noise": _normal(shape, seed, NOISE, samples),
    }
    if options.noise_offset:
        drawn["offset"] = _normal((shape[0], 1, 1), seed, OFFSET, samples)
        drawn["offset_strength"] = _strength(
            options.noise_offset, options.noise_offset_random_strength, seed, OFFSET_STRENGTH, samples
        )
    if options.multires_noise_iterations:
        drawn["pyramid"] = torch.cat([_pyramid(options, shape, seed, index) for index in samples])
    if options.ip_noise_gamma:
        drawn["perturbation"] = _normal(shape, seed, PERTURBATION, samples)
        drawn["perturbation_strength"] = _strength(
            options.ip_noise_gamma,
            options.ip_noise_gamma_random_strength,
            seed,
            PERTURBATION_STRENGTH,
            samples,
        )
    return Draws(**drawn)


def _timestep(options: NoiseOptions, seed: int, index: tuple[int, int]) -> int:
    span = options.max_timestep - options.min_timestep
    return options.min_timestep + int(uniforms(1, seed, TIMESTEP, *index)[0] * span)


def _normal(shape: tuple[int, ...], seed: int, purpose: str, samples: list[tuple[int, int]]) -> Tensor:
    return torch.stack(
        [torch.randn(shape, generator=torch_generator(seed, purpose, *index)) for index in samples]
    )


def _strength(limit: float, random: bool, seed: int, purpose: str, samples: list[tuple[int, int]]) -> Tensor:
    if not random:
        return torch.full((len(samples),), limit)
    return torch.tensor([limit * uniforms(1, seed, purpose, *index)[0] for index in samples])


def _pyramid(options: NoiseOptions, shape: tuple[int, int, int], seed: int, index: tuple[int, int]) -> Tensor:
    channels, height, width = shape
    factors = uniforms(options.multires_noise_iterations, seed, PYRAMID_FACTORS, *index)
    sizes = formulas.pyramid_sizes(height, width, [2 + 2 * factor for factor in factors])
    generator = torch_generator(seed, PYRAMID, *index)
    levels = [torch.randn(1, channels, *size, generator=generator) for size in sizes]
    return formulas.pyramid(levels, height, width, options.multires_noise_discount)
