"""DoRA over LoRA, LoHa and LoKr: the norms of the result, and the three conventions."""

from dataclasses import replace

import pytest
import torch
from conformance.rounding import assert_equal_up_to_rounding
from conformance.samples import Case, Module, cases, make
from hypothesis import given, settings
from hypothesis import strategies as st

from lycotool.algorithms import dora
from lycotool.algorithms.base import MismatchError, Reading
from lycotool.algorithms.detection import weight_change

CASES = [case for case in cases() if case.dora_axis is not None]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def changed(module: Module, *, strength: float = 1.0, reading: Reading | None = None) -> torch.Tensor:
    """``W'`` of a module."""
    bound = module.bound(reading=reading or Reading())
    return module.base + weight_change(module.detected, bound, module.shape, module.base, strength=strength)


def inner(module: Module) -> torch.Tensor:
    """``ΔW₀``, the change without the magnitude."""
    plain = replace(module.without("dora_scale"), case=replace(module.case, dora_axis=None))
    return weight_change(plain.detected, plain.bound(), plain.shape, plain.base, strength=1.0)


def norms(weight: torch.Tensor, axis: str | None) -> torch.Tensor:
    """Norms over every axis but one, a loop over its slices."""
    kept = 0 if axis == "out" else 1
    return torch.stack([part.flatten().norm() for part in weight.unbind(kept)])


@each_case
def test_the_norms_are_the_magnitude(case: Case) -> None:
    module = make(case)

    assert_equal_up_to_rounding(
        norms(changed(module), case.dora_axis), module.tensors["dora_scale"].flatten()
    )


@each_case
def test_the_directions_are_those_of_the_plain_sum(case: Case) -> None:
    module = make(case)
    plain = module.base + inner(module)
    kept = 0 if case.dora_axis == "out" else 1

    for new, old in zip(changed(module).unbind(kept), plain.unbind(kept), strict=True):
        cosine = (new * old).sum() / (new.norm() * old.norm())
        # Three sums of at most 36 · 56 terms: conv weights have that many per slice.
        assert abs(float(cosine) - 1) <= 3 * 36 * 56 * torch.finfo(torch.float64).eps


@each_case
@pytest.mark.parametrize("convention", ["lycoris", "peft"])
def test_all_conventions_agree_at_strength_one(case: Case, convention: str) -> None:
    module = make(case)
    reading = Reading(dora_strength=convention)

    largest = float(module.base.abs().max() + inner(module).abs().max())
    assert_equal_up_to_rounding(changed(module, reading=reading), changed(module), largest=largest)


@each_case
def test_lycoris_strength_does_not_reach_the_inner_change(case: Case) -> None:
    """``V · (s · (m / ‖V‖ - 1) + 1)``: at 0 the plain sum is left."""
    module = make(case)
    reading = Reading(dora_strength="lycoris")

    plain = module.base + inner(module)
    whole = changed(module, reading=reading)
    half = changed(module, strength=0.5, reading=reading)

    largest = float(plain.abs().max() + module.base.abs().max())
    assert_equal_up_to_rounding(changed(module, strength=0.0, reading=reading), plain, largest=largest)
    assert_equal_up_to_rounding(half, (whole + plain) / 2, largest=largest)


@each_case
def test_peft_strength_stands_inside_the_norm(case: Case) -> None:
    """``m · V_s / ‖V_s‖`` with ``V_s = W + s ΔW₀``: every strength has the magnitudes."""
    module = make(case)
    kept = 0 if case.dora_axis == "out" else 1
    direction = module.base - 0.5 * inner(module)
    actual = changed(module, strength=-0.5, reading=Reading(dora_strength="peft"))

    magnitudes = module.tensors["dora_scale"].flatten()
    for new, old, m in zip(actual.unbind(kept), direction.unbind(kept), magnitudes, strict=True):
        largest = float(module.base.abs().max())
        assert_equal_up_to_rounding(new, m * old / old.norm(), largest=largest)


@settings(deadline=None, max_examples=50)
@given(
    o=st.integers(1, 5), i=st.integers(1, 5), kernel=st.sampled_from([(), (3,), (2, 2)]),
    axis=st.sampled_from(["out", "in"]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_magnitude_may_have_any_shape(
    o: int, i: int, kernel: tuple[int, ...], axis: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn((o, i, *kernel), generator=generator, dtype=torch.float64)
    update = torch.randn((o, i, *kernel), generator=generator, dtype=torch.float64)
    count = o if axis == "out" else i
    magnitude = torch.rand(count, generator=generator, dtype=torch.float64) - 0.25  # negative ones too

    results = [
        base
        + dora.delta(
            magnitude.reshape(shape),
            axis,
            update,
            base,
            strength=1.0,
            convention="linear",
        )
        for shape in ((count,), (count, 1), (1, count, *[1] * len(kernel)))
    ]

    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    largest = float(base.abs().max())
    assert_equal_up_to_rounding(norms(results[0], axis), magnitude.abs(), largest=largest)


def test_a_row_of_zeros_stays_finite() -> None:
    base = torch.zeros(2, 3, dtype=torch.float64)
    base[1] = 1.0
    magnitude = torch.ones(2, 1, dtype=torch.float64)

    change = dora.delta(magnitude, "out", torch.zeros_like(base), base, strength=1.0, convention="linear")

    assert torch.isfinite(change).all()
    assert not change[0].any()


@pytest.mark.parametrize(("axis", "count"), [("out", 6), ("in", 5)])
def test_a_magnitude_of_another_width_is_refused(axis: str, count: int) -> None:
    base = torch.ones(5, 6)

    with pytest.raises(MismatchError, match=f"{count} elements for the {axis} axis"):
        dora.delta(
            torch.ones(count),
            axis,
            base,
            base,
            strength=1.0,
            convention="linear",
        )
