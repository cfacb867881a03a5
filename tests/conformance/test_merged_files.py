"""Every stored form of every algorithm enters `merge`: its sum, a method on it, and the verification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conformance.samples import Case, Module, cases, make
from helpers import read, write

from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.ops._adapter import AdapterInput
from lycotool.ops._methods import MethodOptions
from lycotool.ops.merge import AdapterMergeResult, MergeOptions, merge

LAYER, WEIGHTS = "lora_unet_down_a", (0.75, -1.25)
EPS = torch.finfo(torch.float32).eps


def written(case: Case, folder: Path) -> tuple[list[Module], list[AdapterInput], str]:
    """Two adapters of one form and another rank for one layer, and a checkpoint with that layer."""
    modules = [make(case), make(case, rank_shift=-1, seed=1)]
    if modules[0].shape != modules[1].shape:
        modules[1] = make(case, seed=1)
    metadata = None
    if case.hint == "dylora":
        metadata = {"ss_network_module": "networks.dylora"}
    elif case.hint is not None:
        metadata = {"ss_network_args": f'{{"algo": "{case.hint}"}}'}
    inputs = []
    for index, (module, weight) in enumerate(zip(modules, WEIGHTS, strict=True)):
        tensors = {
            f"{LAYER}.{slot}": t.float() if t.is_floating_point() else t for slot, t in module.tensors.items()
        }
        path = write(folder / f"{index}.safetensors", tensors, metadata)
        inputs.append(AdapterInput(str(path), weight))
    base = {"model.diffusion_model.down.a.weight": modules[0].base.float()}
    if any(bias_change(m.detected, m.bound(), strength=1.0) is not None for m in modules):
        base["model.diffusion_model.down.a.bias"] = torch.zeros(modules[0].shape[0])
    return modules, inputs, str(write(folder / "base.safetensors", base))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_form_is_summed_and_verified(case: Case, tmp_path: Path) -> None:
    _, inputs, base = written(case, tmp_path)
    options = MergeOptions(
        output=str(tmp_path / "out.safetensors"), rebuild=True, base=base, verify=True, device="cpu"
    )

    for given in (inputs, inputs[:1]):
        result = merge(given[0], given[1:], options)
        assert isinstance(result, AdapterMergeResult)
        assert result.verified is not None
        assert result.verified.modules == 1
        Path(result.output).unlink()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_form_enters_a_method(case: Case, tmp_path: Path) -> None:
    """TIES of the changes that the registry's formulas give, here in float64."""
    modules, inputs, base = written(case, tmp_path)
    options = MergeOptions(
        output=str(tmp_path / "out.safetensors"), rebuild=True, base=base, verify=True, device="cpu",
        method=MethodOptions(method="ties", density=1.0),
    )  # fmt: skip
    merge(inputs[0], inputs[1:], options)
    out = read(tmp_path / "out.safetensors")

    changes, layer = [], modules[0].base
    for module, weight in zip(modules, WEIGHTS, strict=True):
        changes.append(
            weight_change(module.detected, module.bound(), module.shape, layer, strength=weight).numpy()
        )
    x = np.stack(changes)
    agree = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
    expected = (x * agree).sum(0) / np.maximum(agree.sum(0), 1)
    found = out.get(f"{LAYER}.diff", out.get(f"{LAYER}.w_norm"))
    if found is None:  # a bias alone
        assert not expected.any()
        return
    close = np.abs(found.double().numpy().reshape(expected.shape) - expected) <= 2e-4 * np.abs(x).max()
    # An element whose terms nearly cancel may be elected otherwise in float32.
    near = np.abs(x.sum(0)) <= 1e-4 * np.abs(x).max()
    assert (close | near).all()
