"""``is_finite`` against torch's elementwise answer."""

from __future__ import annotations

import pytest
import torch

from lycotool.linalg.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, -1.5, float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_one_element_decides(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.linspace(-2, 2, 1001).to(dtype)
    tensor[place] = value
    assert is_finite(tensor) is bool(torch.isfinite(tensor).all())


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.tensor(1.0))
    assert not is_finite(torch.tensor(float("nan")))


def test_nan_beside_infinity() -> None:
    assert not is_finite(torch.tensor([float("inf"), float("nan"), -float("inf")]))
