"""Noise and targets against derivations of their own in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lycotool.training import noise as formulas

F32 = torch.finfo(torch.float32).eps


@pytest.fixture
def alphas_cumprod() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_offset_noise_shifts_whole_channels() -> None:
    noise, draw = normal(2, 4, 3, 5), normal(2, 4, 1, 1, seed=1)
    shifted = formulas.offset_noise(noise, draw, torch.tensor([0.1, 0.3], dtype=torch.float64))
    for sample, strength in enumerate((0.1, 0.3)):
        for channel in range(4):
            change = shifted[sample, channel] - noise[sample, channel]
            assert torch.allclose(change, strength * draw[sample, channel].expand_as(change), rtol=1e-12)


@pytest.mark.parametrize("adaptive", [0.5, -50.0])
def test_adaptive_offset_follows_the_mean_and_is_never_negative(adaptive: float) -> None:
    noise, draw, latents = normal(2, 4, 3, 5), normal(2, 4, 1, 1, seed=1), normal(2, 4, 3, 5, seed=2)
    strength = torch.tensor([0.1, 0.3], dtype=torch.float64)
    shifted = formulas.offset_noise(noise, draw, strength, latents=latents, adaptive=adaptive).numpy()
    for b in range(2):
        for c in range(4):
            scale = max(0.0, float(strength[b]) + adaptive * abs(latents.numpy()[b, c].mean()))
            expected = noise.numpy()[b, c] + scale * draw.numpy()[b, c]
            assert np.allclose(shifted[b, c], expected, rtol=1e-12)


def test_pyramid_sizes_are_those_of_sd_scripts() -> None:
    # int(w / r**i), at least 1, and the first level with a side of 1 is the last.
    assert formulas.pyramid_sizes(64, 48, [2.5, 2.0, 3.0, 2.1, 3.9, 2.2]) == [
        (64, 48), (32, 24), (7, 5), (6, 5), (1, 1),
    ]  # fmt: skip
    assert formulas.pyramid_sizes(8, 8, [2.0]) == [(8, 8)]


def test_pyramid_sums_discounted_levels() -> None:
    levels = [normal(2, 4, 8, 8), normal(2, 4, 4, 4, seed=1), normal(2, 4, 1, 1, seed=2)]
    summed = formulas.pyramid(levels, 8, 8, 0.3)
    upsample = torch.nn.Upsample(size=(8, 8), mode="bilinear")
    expected = levels[0] + 0.3 * upsample(levels[1]) + 0.3**2 * levels[2].expand(2, 4, 8, 8)
    assert torch.allclose(summed, expected, rtol=1e-12)


def test_multires_noise_has_unit_deviation_in_each_sample() -> None:
    noise, summed = normal(3, 4, 8, 8), 5 * normal(3, 4, 8, 8, seed=1)
    result = formulas.multires_noise(noise, summed)
    for sample in range(3):
        total = (noise + summed)[sample].numpy()
        assert np.allclose(result[sample].numpy(), total / total.std(ddof=1), rtol=1e-12)


def test_noise_and_velocity_are_a_rotation(alphas_cumprod: torch.Tensor) -> None:
    x, eps = normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=1)
    alpha_bar = alphas_cumprod[[0, 500, 999]]
    noisy, target = formulas.add_noise(x, eps, alpha_bar), formulas.velocity(x, eps, alpha_bar)
    angle = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()).view(-1, 1, 1, 1)
    assert torch.allclose(noisy, angle.cos() * x + angle.sin() * eps, rtol=1e-10, atol=1e-12)
    assert torch.allclose(target, angle.cos() * eps - angle.sin() * x, rtol=1e-10, atol=1e-12)


def test_noise_and_velocity_are_diffusers_own(alphas_cumprod: torch.Tensor) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    x, eps, t = normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=1), torch.tensor([0, 500, 999])
    # theirs is computed from float32 betas: a thousand factors, each rounded once.
    tolerance = {"rtol": 1000 * F32, "atol": 1000 * F32}
    assert torch.allclose(
        formulas.add_noise(x, eps, alphas_cumprod[t]), scheduler.add_noise(x, eps, t), **tolerance
    )
    assert torch.allclose(
        formulas.velocity(x, eps, alphas_cumprod[t]), scheduler.get_velocity(x, eps, t), **tolerance
    )


def test_input_perturbation_adds_its_share() -> None:
    noise, draw = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    gamma = torch.tensor([0.1, 0.0], dtype=torch.float64)
    result = formulas.input_perturbation(noise, draw, gamma)
    assert torch.allclose(result[0], noise[0] + 0.1 * draw[0], rtol=1e-12)
    assert torch.equal(result[1], noise[1])
