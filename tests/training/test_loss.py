"""Losses and their weights against derivations of their own in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lycotool.training import loss as formulas


@pytest.fixture
def alpha_bar() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)[[0, 1, 200, 600, 999]]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))


def test_snr_is_the_ratio_of_the_two_parts(alpha_bar: torch.Tensor) -> None:
    expected = (np.sqrt(alpha_bar.numpy()) / np.sqrt(1 - alpha_bar.numpy())) ** 2
    assert np.allclose(formulas.snr(alpha_bar).numpy(), expected, rtol=1e-12)


def test_plain_losses_are_torchs() -> None:
    a, b = pair()
    functional = torch.nn.functional
    assert torch.equal(
        formulas.elementwise(a, b, "l2", None).mean((1, 2, 3)),
        functional.mse_loss(a, b, reduction="none").mean((1, 2, 3)),
    )
    assert torch.equal(formulas.elementwise(a, b, "l1", None), functional.l1_loss(a, b, reduction="none"))


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_by_scalars(kind: formulas.LossType) -> None:
    a, b = pair()
    c = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    found = formulas.elementwise(a, b, kind, c)
    for sample in range(5):
        for x, y, value in zip(
            a[sample].flatten().tolist(), b[sample].flatten().tolist(), found[sample].flatten().tolist(),
            strict=True,
        ):  # fmt: skip
            threshold = c[sample].item()
            expected = 2 * (math.hypot(x - y, threshold) - threshold)
            assert value == pytest.approx(expected * (threshold if kind == "huber" else 1), rel=1e-9)


def test_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    c = torch.tensor([0.5], dtype=torch.float64)
    near, far = torch.full((1, 1, 1, 1), 1e-4).double(), torch.full((1, 1, 1, 1), 1e4).double()
    zero = torch.zeros_like(near)
    assert formulas.elementwise(near, zero, "huber", c).item() == pytest.approx(1e-8, rel=1e-4)
    assert formulas.elementwise(far, zero, "huber", c).item() == pytest.approx(2 * 0.5 * 1e4, rel=1e-3)


def test_huber_thresholds(alpha_bar: torch.Tensor) -> None:
    steps = torch.tensor([0, 1, 200, 600, 999])
    found = {
        name: formulas.huber_threshold(name, steps, alpha_bar, c=0.1, scale=1.7).tolist()
        for name in ("constant", "exponential", "snr")
    }
    for index, (t, a) in enumerate(zip(steps.tolist(), alpha_bar.tolist(), strict=True)):
        sigma = math.sqrt((1 - a) / a)
        assert found["constant"][index] == pytest.approx(0.17)
        assert found["exponential"][index] == pytest.approx(0.1 ** (t / 1000) * 1.7, rel=1e-6)
        assert found["snr"][index] == pytest.approx(0.9 / (1 + sigma) ** 2 + 0.1, rel=1e-12)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_weights_by_snr(alpha_bar: torch.Tensor, v_prediction: bool) -> None:
    ratio = formulas.snr(alpha_bar)
    min_snr = formulas.min_snr_weight(ratio, 5.0, v_prediction=v_prediction).tolist()
    debiased = formulas.debiased_weight(ratio, v_prediction=v_prediction).tolist()
    for index, value in enumerate(ratio.tolist()):
        limited = min(value, 1000)
        if v_prediction:
            assert min_snr[index] == pytest.approx(min(value, 5) / (value + 1))
            assert debiased[index] == pytest.approx(1 / (limited + 1))
        else:
            assert min_snr[index] == pytest.approx(min(value, 5) / value)
            assert debiased[index] == pytest.approx(1 / math.sqrt(limited))


def test_weights_of_v_prediction(alpha_bar: torch.Tensor) -> None:
    ratio = formulas.snr(alpha_bar)
    scale, liked = formulas.noise_like_weight(ratio).tolist(), formulas.v_like_weight(ratio, 0.2).tolist()
    for index, value in enumerate(ratio.tolist()):
        limited = min(value, 1000)
        assert scale[index] == pytest.approx(limited / (limited + 1))
        assert liked[index] == pytest.approx(1 + 0.2 * (limited + 1) / limited)


def test_zero_terminal_snr_gives_finite_weights_with_v_prediction() -> None:
    ratio = formulas.snr(torch.tensor([0.0, 0.5]))
    for weight in (
        formulas.min_snr_weight(ratio, 5.0, v_prediction=True),
        formulas.debiased_weight(ratio, v_prediction=True),
    ):
        assert weight.isfinite().all()
