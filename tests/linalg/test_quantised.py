"""float8 with scales of tensors, rows and blocks, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.linalg.quantised import Rounding, count_beyond, dequantise_, read_into, requantise_

FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

Case = tuple[tuple[int, ...], tuple[int, int], tuple[int, int]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shape, grid and block; the last blocks may be cut off."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = (
        rows * height - draw(st.integers(0, height - 1)),
        columns * width - draw(st.integers(0, width - 1)),
    )
    return shape, (rows, columns), (height, width)


def expanded(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of every element, by its own indices."""
    return torch.stack(
        [torch.stack([scale[i // block[0], j // block[1]] for j in range(shape[1])]) for i in range(shape[0])]
    ).double()


@settings(deadline=None, max_examples=60)
@given(case=cases(), seed=st.integers(0, 2**31), dtype=st.sampled_from(list(FLOAT8)))
def test_blocks_and_back(case: Case, seed: int, dtype: torch.dtype) -> None:
    shape, grid, block = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 3.0
    scales = torch.rand(grid, generator=generator) + 0.1

    read = dequantise_(weight.clone(), scales, block)
    every = expanded(scales, block, shape)
    assert torch.equal(read, (weight * every.float()))

    stored, new, beyond = requantise_(weight.clone(), grid, block, dtype, torch.float32)
    assert (stored.dtype, new.shape, beyond) == (dtype, torch.Size(grid), 0)
    limit = FLOAT8[dtype]
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert float(new[i, j]) == float(part.abs().max() / limit)
    # Half the spacing of float8 at each value: relative where it is normal, else fixed.
    step = expanded(new, block, shape)
    allowed = torch.maximum(
        weight.abs().double() * torch.finfo(dtype).eps / 2,
        step * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2,
    )
    error = (stored.double() * step - weight.double()).abs()
    assert (error <= allowed * (1 + 1e-5)).all()  # the scale and the quotient round in float32


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2, 2), (0, 4)])
def test_other_shapes_count_as_matrices(shape: tuple[int, ...]) -> None:
    weight = torch.rand(shape) + 0.5
    rows = shape[0] if shape else 1
    columns = weight.numel() // rows if rows else 4
    stored, scale, _ = requantise_(
        weight.clone(), (rows, 1), (1, columns), torch.float8_e4m3fn, torch.float32
    )
    back = dequantise_(stored.float(), scale, (1, columns))
    assert back.shape == weight.shape
    assert torch.allclose(back, weight, rtol=2**-4, atol=0)


def test_zeros_have_scale_one() -> None:
    stored, scale, _ = requantise_(torch.zeros(2, 3), (1, 1), (2, 3), torch.float8_e4m3fn, torch.bfloat16)
    assert scale.tolist() == [[1.0]]
    assert not stored.float().any()


@pytest.mark.parametrize(
    ("peak", "scale"),
    [(448 * 2.0**-24 * 1.4, 2.0**-24), (448 * 65504 * 2.0, 65504.0)],
    ids=["small", "large"],
)
def test_a_scale_that_float16_cannot_hold_saturates_and_is_counted(peak: float, scale: float) -> None:
    weight = torch.tensor([[peak, -peak, 0.5 * peak, 0.0]])
    stored, held, beyond = requantise_(weight, (1, 1), (1, 4), torch.float8_e4m3fn, torch.float16)
    assert (float(held), beyond) == (scale, 2)
    assert stored.float()[0, :2].tolist() == [448.0, -448.0]


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.float8_e4m3fn, 464.0), (torch.float8_e5m2, 61440.0)], ids=str
)
def test_beyond_is_what_does_not_round_to_the_largest(dtype: torch.dtype, last: float) -> None:
    values = torch.tensor([0.0, last * 0.999, last, -last, last * 1.001, -2 * last])
    assert count_beyond(values, dtype) == 2


def test_rounding_adds_up() -> None:
    rounding = Rounding()
    rounding.add(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]))
    rounding.add(torch.tensor([[-4.0]]), torch.tensor([[-5.0]]))
    rounding.add(torch.zeros(0), torch.zeros(0))
    assert (rounding.largest, rounding.mean, rounding.count) == (1.0, 0.5, 3)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.bfloat16,
        torch.float16,
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (256,), (3, 2**19 + 5)], ids=str)
def test_what_is_stored_is_read_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every code there is, NaN and infinity among them, as torch converts it."""
    count = torch.Size(shape).numel() * dtype.itemsize
    codes = torch.arange(count, dtype=torch.int64).remainder(251 if count > 256 else 256).to(torch.uint8)
    stored = codes.view(dtype).view(shape)
    values = torch.full(shape, 7.0)
    assert read_into(values, stored) is values
    assert torch.equal(values.view(torch.int32), stored.float().view(torch.int32))


def test_turned_tensors_are_read_too() -> None:
    stored = torch.arange(6, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 3)
    assert torch.equal(read_into(torch.empty(3, 2), stored.T), stored.float().T)
    assert torch.equal(read_into(torch.empty(2, 3).double(), stored), stored.double())
