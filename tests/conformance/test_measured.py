"""`inspect --stats` and `--compare` of every stored form, against the dense change in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance.samples import Case, Module, cases, make
from helpers import write

from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.ops.inspect import InspectOptions, InspectReport, inspect

NAME = "lora_unet_x"

#: The changes are computed in float32 from values that are exact in it.
TOLERANCE = 2e-5


def save(path: Path, module: Module) -> Path:
    """One module as a file of sd-scripts' names."""
    tensors = {
        f"{NAME}.{slot}": tensor.float() if tensor.is_floating_point() else tensor
        for slot, tensor in module.tensors.items()
    }
    hint = module.case.hint
    return write(path, tensors, {"ss_network_args": json.dumps({"algo": hint})} if hint else None)


def save_base(path: Path, module: Module) -> Path:
    base = {"model.diffusion_model.x.weight": module.base.float(),
            "model.diffusion_model.x.bias": torch.zeros(module.shape[0])}  # fmt: skip
    return write(path, base)


def change_of(module: Module, base: Module) -> np.ndarray:
    """``ΔW`` flattened, in float64."""
    change = weight_change(
        module.detected, module.bound(), module.shape, base.base.float().double(), strength=1.0
    )
    return change.reshape(module.shape[0], -1).numpy()


def measured(path: Path, module: Module, **options: object) -> InspectReport:
    base = save_base(path.with_name("base.safetensors"), module)
    return inspect(str(path), InspectOptions(base=str(base), device="cpu", **options))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_statistics_are_those_of_the_dense_change(case: Case, tmp_path: Path) -> None:
    module = make(case)
    report = measured(save(tmp_path / "a.safetensors", module), module, stats=True)

    (stats,) = report.stats.modules
    dense = change_of(module, module)
    values = np.linalg.svd(dense, compute_uv=False)
    values = values[values > 1e-6 * max(values.max(), 1e-300)]
    norm = math.sqrt(np.square(values).sum())
    assert stats.fro == pytest.approx(norm, rel=TOLERANCE, abs=1e-12)
    if norm == 0:
        assert (stats.spectral, stats.stable_rank, stats.effective_rank, stats.energy_rank_99) == (0, 0, 0, 0)
    else:
        assert stats.spectral == pytest.approx(values[0], rel=TOLERANCE)
        assert stats.rms == pytest.approx(norm / math.sqrt(dense.size), rel=TOLERANCE)
        assert stats.stable_rank == pytest.approx(norm**2 / values[0] ** 2, rel=TOLERANCE)
        shares = values / values.sum()
        # Values lost in float32's rounding have shares whose p·ln p is below 1e-5.
        assert stats.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
        energy = np.square(values).cumsum() / norm**2
        for share in (0.90, 0.95, 0.99):
            if min(abs(energy - share)) > 1e-4:
                assert getattr(stats, f"energy_rank_{share * 100:.0f}") == 1 + int((energy < share).sum())
        weight = float(module.base.float().double().norm())
        assert stats.relative == pytest.approx(norm / weight, rel=TOLERANCE)
    shift = bias_change(module.detected, module.bound(), strength=1.0)
    assert stats.bias == pytest.approx(0.0 if shift is None else float(shift.norm()), rel=TOLERANCE)
    assert stats.is_dead == (norm == 0 and stats.bias == 0)
    assert stats.is_finite


@pytest.mark.parametrize("case", [case for case in cases() if make(case).detected.needs_base], ids=str)
def test_without_a_base_it_is_said_what_needs_one(case: Case, tmp_path: Path) -> None:
    report = inspect(
        str(save(tmp_path / "a.safetensors", make(case))), InspectOptions(stats=True, device="cpu")
    )

    (stats,) = report.stats.modules
    assert stats.fro is None
    assert report.stats.unmeasured == {"depends on the base weight": 1}
    assert report.stats.totals.measured == 0


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_comparison_is_that_of_the_dense_changes(case: Case, tmp_path: Path) -> None:
    one, two = make(case), make(case, seed=1)
    other = save(tmp_path / "b.safetensors", two)
    report = measured(save(tmp_path / "a.safetensors", one), one, compare=str(other))

    (row,) = report.comparison.layers
    a, b = change_of(one, one), change_of(two, one)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if not norms[0]:
        assert row.cosine is None
        assert row.reason
        return
    assert (row.norm, row.other_norm) == pytest.approx(norms, rel=TOLERANCE)
    assert row.norm_ratio == pytest.approx(norms[1] / norms[0], rel=TOLERANCE)
    assert row.cosine == pytest.approx((a * b).sum() / (norms[0] * norms[1]), abs=TOLERANCE)
    energy = norms[0] ** 2 + norms[1] ** 2
    assert row.interference == pytest.approx(2 * (a * b).sum() / energy, abs=TOLERANCE)
    # Of layers this small every element is in the sample; zeros of one of them do not count.
    nonzero = (abs(a) > 1e-6 * abs(a).max()) & (abs(b) > 1e-6 * abs(b).max())
    expected = ((a * b)[nonzero] < 0).sum() / nonzero.sum() if nonzero.any() else None
    if a.shape[0] <= 64 and a.shape[1] <= 64 and expected is not None:
        assert row.sign_conflict == pytest.approx(expected, abs=2.5 / nonzero.sum())
    assert report.comparison.cosine == pytest.approx(row.cosine)
    for mine, dense in ((row.overlap_out, (a, b)), (row.overlap_in, (a.T, b.T))):
        assert mine == pytest.approx(overlap(*dense), abs=1e-3)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cos² of the principal angles of the column spaces that hold 90 % of the energy."""
    bases = []
    for matrix in (a, b):
        left, values, _ = np.linalg.svd(matrix, full_matrices=False)
        energy = np.square(values).cumsum() / np.square(values).sum()
        bases.append(left[:, : 1 + int((energy < 0.9 * (1 - 1e-9)).sum())])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(np.square(cosines).mean())
