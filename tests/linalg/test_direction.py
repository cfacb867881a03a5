"""The nearest DoRA: weights that DoRA made are found again, others come as near as one step or nearer."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lycotool.linalg import direction
from lycotool.linalg.direction import nearest_direction

#: Wide enough for rank 3: the nearer the rank to the smaller side, the more rounds it takes.
SHAPES = [(24, 40), (40, 24), (32, 32), (24, 20, 3, 3), (24, 28, 1, 1), (28, 24, 3)]
EPS = torch.finfo(torch.float32).eps


def others(tensor: Tensor, axis: int) -> list[int]:
    return [dim for dim in range(tensor.ndim) if dim != axis]


def norms(tensor: Tensor, axis: int) -> Tensor:
    return tensor.square().sum(others(tensor, axis), keepdim=True).sqrt()


def dora(base: Tensor, change: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """``m (W + X) / ‖W + X‖`` in float64."""
    v = base.double() + change.double().reshape(base.shape)
    return magnitude.double() * v / norms(v, axis)


def made_by_dora(
    shape: tuple[int, ...], axis: int, rank: int, *, share: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A base weight, one that DoRA made of it in float32, and the magnitudes.

    ``share`` is the size of the low-rank part beside the weight.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = normal(*shape).float()
    change = normal(shape[0], rank) @ normal(rank, base[0].numel())
    change *= share * base.norm() / change.norm()
    wide = norms(base.double(), axis)
    magnitude = wide * (1 + 0.3 * torch.rand(wide.shape, generator=generator, dtype=torch.float64))
    return base, dora(base, change, magnitude, axis).float(), magnitude


def arbitrary(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """A base weight and one with a change of full rank."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, base + 0.3 * torch.randn(shape, generator=generator)


def residual(base: Tensor, tuned: Tensor, change: Tensor, axis: int) -> float:
    """``min ‖D·W' - W - X‖`` over the diagonal ``D``, in float64: what the method minimises."""
    v, target = base.double() + change.double().reshape(base.shape), tuned.double()
    scale = (target * v).sum(others(v, axis), keepdim=True) / norms(target, axis) ** 2
    return float((scale * target - v).norm())


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets a test choose how many rounds are done, without an early end."""
    monkeypatch.setattr(direction, "_CONVERGED", 0.0)
    return monkeypatch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
@pytest.mark.parametrize("rank", [1, 3])
def test_what_dora_made_is_recovered(shape: tuple[int, ...], axis: int, rank: int) -> None:
    base, tuned, magnitude = made_by_dora(shape, axis, rank, share=0.2)

    low, found = nearest_direction(base, tuned, axis, rank, seed=0)

    assert low.rank == rank
    assert found.shape == magnitude.shape
    # Two vectors of float32 numbers, compared after rounding the tuned weight: a few eps.
    assert float((found - magnitude).norm()) <= 8 * EPS * float(magnitude.norm())
    rebuilt = dora(base, low.dense(), found, axis)
    # Rounding W' to float32 leaves eps/2 of the weight. The rounds end when one gains less
    # than 0.1 %, and the last ones gain far more than that until rounding is all that is left:
    # 32 eps is that rounding, met in the difference, the norms and the factors.
    assert float((rebuilt - tuned).norm()) <= 32 * EPS * float(tuned.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
def test_more_rounds_never_raise_the_residual(
    shape: tuple[int, ...], axis: int, rounds: pytest.MonkeyPatch
) -> None:
    base, tuned = arbitrary(shape, seed=len(shape))
    history = []
    for count in (1, 2, 3, 5, 10, 20):
        rounds.setattr(direction, "_ROUNDS", count)
        low, _ = nearest_direction(base, tuned, axis, 3, seed=0)
        history.append(residual(base, tuned, low.dense(), axis))
    # float32 moves each residual by a few eps of the weight.
    slack = 8 * EPS * float(base.norm())
    assert all(later <= earlier + slack for earlier, later in pairwise(history)), history


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
@pytest.mark.parametrize("made", ["by DoRA", "at random"])
def test_never_worse_than_one_step(
    shape: tuple[int, ...], axis: int, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = made_by_dora(shape, axis, 3, share=0.4)[:2] if made == "by DoRA" else arbitrary(shape, 5)

    full, _ = nearest_direction(base, tuned, axis, 2, seed=0)
    monkeypatch.setattr(direction, "_ROUNDS", 1)
    once, _ = nearest_direction(base, tuned, axis, 2, seed=0)

    slack = 8 * EPS * float(base.norm())  # as above
    assert residual(base, tuned, full.dense(), axis) <= (residual(base, tuned, once.dense(), axis) + slack)


@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
def test_rows_or_columns_that_became_zero(axis: int) -> None:
    """A pruned channel has no direction; its magnitude is 0 and nothing is infinite."""
    base, tuned, _ = made_by_dora((12, 16), axis, 2, share=0.2)
    tuned.select(axis, 3).zero_()

    low, magnitude = nearest_direction(base, tuned, axis, 3, seed=0)

    assert float(magnitude.flatten()[3]) == 0
    assert all(torch.isfinite(part).all() for part in (low.up, low.down, magnitude))


@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
def test_a_pure_scaling_needs_no_change_of_direction(axis: int) -> None:
    base = torch.randn(12, 16, generator=torch.Generator().manual_seed(6))
    scale = torch.linspace(0.5, 2, base.shape[axis]).unsqueeze(1 - axis)

    low, magnitude = nearest_direction(base, base * scale, axis, 2, seed=0)

    assert torch.allclose(magnitude, norms(base, axis) * scale, rtol=8 * EPS)
    assert float(low.dense().norm()) <= 8 * EPS * float(base.norm())  # what rounding leaves


def test_equal_seeds_give_equal_bits() -> None:
    base, tuned = arbitrary((210, 230), seed=7)

    (first, _), (again, _) = (nearest_direction(base, tuned, 0, 4, seed=3) for _ in range(2))

    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
