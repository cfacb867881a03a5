"""What becomes zero by rounding: counted as numpy and float64 do it, and read only where it can matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lycotool.linalg.underflow import Underflow, vanishing

#: dtypes with their smallest value and unit roundoff, from the formats' definitions.
FORMATS = {
    torch.float16: (2.0**-24, 2.0**-11),
    torch.bfloat16: (2.0**-133, 2.0**-8),
    torch.float32: (2.0**-149, 2.0**-24),
    torch.float8_e4m3fn: (2.0**-9, 2.0**-4),
    torch.float8_e5m2: (2.0**-16, 2.0**-3),
}

DTYPES = st.sampled_from(list(FORMATS))


@st.composite
def values(draw: st.DrawFn) -> tuple[torch.dtype, np.ndarray]:
    """Values about the smallest one of a dtype, and a few larger ones."""
    dtype = draw(DTYPES)
    smallest, _ = FORMATS[dtype]
    many = draw(
        arrays(np.float64, st.integers(1, 300), elements=st.floats(-3, 3).map(lambda x: round(x, 6)))
    ) * draw(st.sampled_from((0.1, 0.5, 1.0, 4.0, 30.0)))
    few = [2.0 ** draw(st.integers(0, 14)) for _ in range(draw(st.integers(0, 2)))]
    return dtype, np.concatenate([many, few]) * smallest


def rounded(numbers: np.ndarray, smallest: float, roundoff: float) -> np.ndarray:
    """To the nearest multiple of the spacing, of two the even one: IEEE 754 in float64."""
    magnitude = np.maximum(np.abs(numbers), smallest / roundoff / 2)  # the smallest normal number
    spacing = 2.0 ** np.floor(np.log2(magnitude)) * 2 * roundoff
    return np.round(numbers / spacing) * spacing


@settings(deadline=None, max_examples=400)
@given(values())
def test_agrees_with_the_definition(drawn: tuple[torch.dtype, np.ndarray]) -> None:
    """In float64, rounded by the formats' spacing alone."""
    dtype, numbers = drawn
    smallest, roundoff = FORMATS[dtype]
    exact = torch.from_numpy(numbers)
    saved = exact.float().to(dtype) if dtype.itemsize == 1 else exact.to(dtype)
    after = rounded(numbers, smallest, roundoff)
    is_small = np.abs(numbers) < smallest / roundoff / 2
    norm = np.linalg.norm(numbers / smallest)
    share = np.linalg.norm((after - numbers)[is_small] / smallest) / norm if norm else 0.0
    accepted = max(roundoff, 2.0**-8)
    found = vanishing(exact, saved, float(np.abs(numbers).max()), "a")
    if abs(share - accepted) > 1e-9:
        assert (found is not None) == (share > accepted)
    if found is not None:
        assert found.share == pytest.approx(share, rel=1e-9)  # sums of 300 squares in float64
        assert found.zeros == int(((after == 0) & (numbers != 0)).sum())
        assert found.nonzero == int((numbers != 0).sum())


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_shortcut_is_the_bound(dtype: torch.dtype) -> None:
    """Many values that vanish just so beside one as large as the shortcut asks: all that can be lost unseen."""
    smallest, roundoff = FORMATS[dtype]
    accepted = max(roundoff, 2.0**-8)
    count = 2**20
    exact = torch.full((count,), smallest / 2, dtype=torch.float64)
    reach = math.sqrt(count) * torch.finfo(dtype).smallest_normal * roundoff / accepted
    exact[0] = reach
    lost = float(torch.linalg.vector_norm(exact[1:] / reach))
    assert lost == pytest.approx(accepted, rel=1e-6)  # one value of 2^20 is the other's
    assert vanishing(exact, exact.to(dtype), reach, "a") is None
    exact[0] = reach * 0.99
    assert vanishing(exact, exact.to(dtype), reach * 0.99, "a") is not None


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_large_is_not_read_again(dtype: torch.dtype) -> None:
    """A tensor without data: whoever reads it fails."""
    exact = torch.empty(10_000, device="meta")
    reach = math.sqrt(10_000) * torch.finfo(dtype).smallest_normal
    assert vanishing(exact, torch.empty(10_000, device="meta", dtype=dtype), reach, "a") is None


def test_a_dtype_that_stays_is_not_read() -> None:
    exact = torch.empty(10, device="meta", dtype=torch.float16)
    assert vanishing(exact, exact, 2.0**-24, "a") is None


def test_zeros_lose_nothing() -> None:
    exact = torch.zeros(10)
    assert vanishing(exact, exact.half(), 0.0, "a") is None


def test_half_precision_input_is_counted_in_float32() -> None:
    """In float16 the quotient by the largest would itself become zero."""
    exact = torch.tensor([2.0**-12] + [2.0**-24] * 9, dtype=torch.float16)
    found = vanishing(exact, exact.float().to(torch.float8_e4m3fn), 2.0**-12, "a")
    assert found is not None
    assert (found.zeros, found.nonzero) == (10, 10)


def test_one_line_about_the_worst() -> None:
    underflow = Underflow()
    assert underflow.warnings() == ()
    tiny, part = torch.full((4,), 1e-9), torch.tensor([1e-6, 1e-8, 1e-8, 0.0])
    for _ in range(2):  # a tensor that is made twice, to verify it
        underflow.look(part, part.half(), 1e-6, "b")
        underflow.look(tiny, tiny.half(), 1e-9, "a")
    (line,) = underflow.warnings()
    assert line.startswith(
        "a: underflow: off by 100 % of its norm in float16, where 4 of 4 values become 0, and 1 "
    )
    assert "and 1 other tensor by less; bf16 and fp32" in line


def test_small_values_need_not_become_zero() -> None:
    """3e-8 is nearer to 2^-24 than to 0: twice as large in float16."""
    exact = torch.full((64,), 3e-8)
    found = vanishing(exact, exact.half(), 3e-8, "a")
    assert found is not None
    assert found.zeros == 0
    assert found.share == pytest.approx(2.0**-24 / 3e-8 - 1, rel=1e-5)  # float32


def test_float16_is_given_what_bfloat16_takes() -> None:
    """Normal numbers of 2e-5, below float16's normal ones, lose less there than in bfloat16; of 1e-6 more."""
    for size, is_told in ((2e-5, False), (1e-6, True)):
        exact = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * size
        assert (vanishing(exact, exact.half(), float(exact.abs().max()), "a") is not None) == is_told
        worse, other = (float((exact.to(d).float() - exact).norm()) for d in (torch.half, torch.bfloat16))
        assert (worse > other) == is_told
