"""What is drawn for a step, and that every option of noise and loss changes what it says it does."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from lycotool.errors import UsageError
from lycotool.training import loss as losses
from lycotool.training import noise as noises
from lycotool.training.bases.schedule import alphas_cumprod, with_zero_terminal_snr
from lycotool.training.diffusion import Diffusion, check_noise
from lycotool.training.diffusion_options import LossOptions, NoiseOptions
from lycotool.training.draws import Draws, draw

SHAPE = (4, 8, 6)
CPU = torch.device("cpu")
EVERYTHING = NoiseOptions(
    noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=0.2, multires_noise_iterations=3,
    ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True,
)  # fmt: skip


def drawn(options: NoiseOptions, *, seed: int = 1, step: int = 5, first: int = 0, count: int = 3) -> Draws:
    return draw(options, SHAPE, seed=seed, step=step, first=first, count=count)


def same(a: Draws, b: Draws) -> bool:
    values = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Draws)]
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in values)


def diffusion(*, v_prediction: bool = False, zero: bool = False, noise: Any = None, **loss: Any) -> Diffusion:
    alphas = alphas_cumprod()
    return Diffusion(
        noise or NoiseOptions(), LossOptions(**loss), with_zero_terminal_snr(alphas) if zero else alphas,
        v_prediction=v_prediction, device=CPU,
    )  # fmt: skip


def test_draws_are_of_the_sample_and_not_of_its_batch() -> None:
    whole = drawn(EVERYTHING, count=3)
    parts = [drawn(EVERYTHING, first=number, count=1) for number in range(3)]
    for field in fields(Draws):
        together = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(getattr(whole, field.name), together), field.name


def test_draws_differ_by_seed_and_step() -> None:
    assert same(drawn(EVERYTHING), drawn(EVERYTHING))
    assert not same(drawn(EVERYTHING), drawn(EVERYTHING, seed=2))
    assert not same(drawn(EVERYTHING), drawn(EVERYTHING, step=6))


def test_options_that_are_off_draw_nothing() -> None:
    plain = drawn(NoiseOptions())
    assert [f.name for f in fields(Draws) if getattr(plain, f.name) is not None] == ["timesteps", "noise"]
    assert torch.equal(plain.noise, drawn(EVERYTHING).noise)


def test_timesteps_stay_in_their_range_and_fill_it() -> None:
    options = NoiseOptions(min_timestep=100, max_timestep=104)
    found = set(drawn(options, count=200).timesteps.tolist())
    assert found == {100, 101, 102, 103}
    wide = drawn(NoiseOptions(), count=2000).timesteps.double()
    # The mean of 2000 uniform draws: 288.7 / √2000 is its deviation.
    assert abs(wide.mean() - 499.5) < 4 * 288.7 / 2000**0.5


def test_random_strengths_are_below_the_given_one() -> None:
    found = drawn(EVERYTHING, count=100)
    for strength in (found.offset_strength, found.perturbation_strength):
        assert 0 <= strength.min() < 0.01
        assert 0.09 < strength.max() < 0.1
    fixed = drawn(NoiseOptions(noise_offset=0.1, ip_noise_gamma=0.2))
    assert fixed.offset_strength.tolist() == pytest.approx([0.1] * 3)
    assert fixed.perturbation_strength.tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_everything_together_is_the_formulas_in_their_order(v_prediction: bool) -> None:
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    draws = drawn(EVERYTHING)
    noisy, target = diffusion(noise=EVERYTHING, v_prediction=v_prediction).corrupt(latents, draws)
    alpha_bar = alphas_cumprod().float()[draws.timesteps]
    noise = noises.offset_noise(
        draws.noise, draws.offset, draws.offset_strength, latents=latents, adaptive=0.2
    )
    noise = noises.multires_noise(noise, draws.pyramid)
    seen = noises.input_perturbation(noise, draws.perturbation, draws.perturbation_strength)
    assert torch.equal(noisy, noises.add_noise(latents, seen, alpha_bar))
    assert torch.equal(target, noises.velocity(latents, noise, alpha_bar) if v_prediction else noise)


@pytest.mark.parametrize(
    "options",
    [{"noise_offset": 0.1}, {"noise_offset": 0.1, "adaptive_noise_scale": 1.0}, {"multires_noise_iterations": 2},
     {"multires_noise_iterations": 2, "multires_noise_discount": 0.9}, {"ip_noise_gamma": 0.1}],
)  # fmt: skip
def test_each_noise_option_changes_the_input(options: dict[str, Any]) -> None:
    latents = torch.ones(3, *SHAPE)
    seen = []
    for values in ({}, options, dict(list(options.items())[:1]) if len(options) > 1 else {}):
        noise = NoiseOptions(**values)
        seen.append(diffusion(noise=noise).corrupt(latents, drawn(noise)))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[1][0], seen[2][0])
    # Input perturbation alone leaves the target.
    assert torch.equal(seen[0][1], seen[1][1]) == ("ip_noise_gamma" in options)


@pytest.mark.parametrize(
    ("values", "weight"),
    [
        ({"min_snr_gamma": 5.0}, lambda r, v: losses.min_snr_weight(r, 5.0, v_prediction=v)),
        ({"debiased_estimation_loss": True}, lambda r, v: losses.debiased_weight(r, v_prediction=v)),
        ({"v_pred_like_loss": 0.3}, lambda r, v: losses.v_like_weight(r, 0.3)),
        ({"scale_v_pred_loss_like_noise_pred": True}, lambda r, v: losses.noise_like_weight(r)),
    ],
)
def test_weights_multiply_the_loss_of_each_sample(values: dict[str, Any], weight: Any) -> None:
    v_prediction = "scale_v_pred_loss_like_noise_pred" in values
    prediction, target = torch.zeros(3, *SHAPE), drawn(NoiseOptions()).noise
    timesteps, ones = torch.tensor([10, 400, 900]), torch.ones(3)
    plain = diffusion(v_prediction=v_prediction).loss(prediction, target, timesteps, ones)
    weighted = diffusion(v_prediction=v_prediction, **values).loss(prediction, target, timesteps, ones)
    ratio = losses.snr(alphas_cumprod().float()[timesteps])
    assert torch.allclose(weighted, plain * weight(ratio, v_prediction), rtol=1e-6)
    assert not torch.allclose(weighted, plain)


@pytest.mark.parametrize(
    "values",
    [{"loss_type": "l1"}, {"loss_type": "huber"}, {"loss_type": "smooth_l1"},
     {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.5},
     {"loss_type": "huber", "huber_schedule": "exponential", "huber_scale": 2.0}],
)  # fmt: skip
def test_losses_are_the_mean_of_their_elements(values: dict[str, Any]) -> None:
    prediction, target = torch.zeros(3, *SHAPE), drawn(NoiseOptions()).noise
    timesteps = torch.tensor([10, 400, 900])
    found = diffusion(**values).loss(prediction, target, timesteps, torch.ones(3))
    options = LossOptions(**values)
    threshold = losses.huber_threshold(
        options.huber_schedule, timesteps, alphas_cumprod().float()[timesteps], c=options.huber_c,
        scale=options.huber_scale,
    )  # fmt: skip
    expected = losses.elementwise(prediction, target, options.loss_type, threshold).flatten(1).mean(1)
    assert torch.allclose(found, expected, rtol=1e-5)
    plain = diffusion().loss(prediction, target, timesteps, torch.ones(3))
    assert not torch.allclose(found, plain)


def test_a_sample_has_its_own_weight() -> None:
    prediction, target = torch.zeros(3, *SHAPE), drawn(NoiseOptions()).noise
    timesteps = torch.tensor([10, 400, 900])
    plain = diffusion().loss(prediction, target, timesteps, torch.ones(3))
    assert torch.equal(
        diffusion().loss(prediction, target, timesteps, torch.tensor([1.0, 0.5, 0.0])),
        plain * torch.tensor([1.0, 0.5, 0.0]),
    )


def test_zero_terminal_snr_reaches_pure_noise() -> None:
    latents, draws = torch.ones(1, *SHAPE), drawn(NoiseOptions(min_timestep=999), count=1)
    noisy, target = diffusion(zero=True, v_prediction=True).corrupt(latents, draws)
    assert torch.equal(noisy, draws.noise)
    assert torch.equal(target, -latents)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "leaves no step"),
        ({"adaptive_noise_scale": 0.1}, "--adaptive-noise-scale does nothing without --noise-offset"),
        ({"ip_noise_gamma_random_strength": True}, "does nothing without --ip-noise-gamma"),
    ],
)
def test_contradictions_of_noise(noise: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_noise(NoiseOptions(**noise))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero": True}, "epsilon prediction"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "predict velocity"),
        ({"v_prediction": True, "v_pred_like_loss": 0.1}, "predict noise"),
    ],
)
def test_contradictions_with_the_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        diffusion(**values)
