"""The noise schedule against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from lycotool.errors import IncompatibleError
from lycotool.training.bases.schedule import alphas_cumprod, from_scheduler_config, with_zero_terminal_snr

PUBLISHED: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
#: diffusers computes in float32: 1000 products, each rounded by half an eps.
RTOL = 1000 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize(
    "config", [PUBLISHED, {**PUBLISHED, "beta_schedule": "linear"}, {**PUBLISHED, "num_train_timesteps": 50}]
)
def test_alphas(config: dict[str, Any]) -> None:
    got, expected = from_scheduler_config(config), DDPMScheduler(**config).alphas_cumprod
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected, rtol=RTOL, atol=0)


def test_default_is_the_published_schedule() -> None:
    assert torch.equal(from_scheduler_config({}), alphas_cumprod())
    assert torch.equal(from_scheduler_config(PUBLISHED), alphas_cumprod())


def test_zero_terminal_snr() -> None:
    alphas = alphas_cumprod()
    got = with_zero_terminal_snr(alphas)
    betas = rescale_zero_terminal_snr(1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]]))
    # The oracle gives betas; multiplying them up again loses a few bits.
    torch.testing.assert_close(got, (1 - betas).cumprod(0), rtol=1e-10, atol=1e-15)
    assert got[-1] == 0
    assert got[0] == pytest.approx(float(alphas[0]), rel=1e-14)
    assert bool((got.diff() < 0).all())


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2]},
        {"beta_start": 0},
        {"beta_end": "0.012"},
        {"num_train_timesteps": None},
    ],
)
def test_other_schedules_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError):
        from_scheduler_config(config)
