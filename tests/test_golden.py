"""The golden vectors: adapters with the result their trainer's forward pass gives.

Each case runs through the command line, so the whole path is covered: key names, detection,
scales, formulas, checkpoint lookup, writing. See ``golden/README.md`` for how the expected
values were made.

Tolerances. ``expected.weight`` is float32 output of another program's matmuls: its README
asks for 1e-5 of the largest element, which every stored dtype must meet because the stored
(rounded) values are the truth. Deltas of merge pairs are float64 sums; the merged adapter is
saved in float32 and added to a float32 weight, which costs a few eps(float32) = 1.2e-7 of
the weight: 2e-6 leaves room for the sums over the rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, read, succeed, write

from lycotool.algorithms import SLOT_NAMES
from lycotool.algorithms.base import DEFAULT_READING, Bound
from lycotool.algorithms.detection import detect
from lycotool.formats.keys import parse_keys
from lycotool.linalg.low_rank import LowRank
from lycotool.models.naming import split_name

CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
PAIRS = json.loads((GOLDEN / "merge_pairs.json").read_text())["pairs"]

#: Where programs disagree and the file cannot tell: the option that gives the other reading.
OTHER_READING = {
    "lora_linear_alpha_zero": {"default": "alternative", "expected": ("--alpha-zero", "rank")},
    "dylora_linear_blocks": {"default": "alternative", "expected": ("--dylora-block-size", "2")},
    "glora_old_linear_alpha": {"default": "expected", "alternative": ("--glora-old-scale", "once")},
}

PREFIXES = {
    "lora_unet_": "model.diffusion_model.",
    "oft_unet_": "model.diffusion_model.",
    "lora_te_": "cond_stage_model.transformer.",
    "lycoris_": "",
    "base_model.model.": "",
}


def checkpoint_path(module: str) -> str:
    """A checkpoint path whose flattened form is the module's."""
    prefix = next(prefix for prefix in PREFIXES if module.startswith(prefix))
    return PREFIXES[prefix] + module.removeprefix(prefix)


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def write_base(folder: Path, tensors: dict[str, torch.Tensor], module: str) -> tuple[Path, str]:
    path = checkpoint_path(module)
    state = {f"{path}.{name}": tensor for name, tensor in part(tensors, "base.").items()}
    return write(folder / "base.safetensors", state), path


def write_adapter(folder: Path, case: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    adapter = part(tensors, "adapter.")
    if "adapter_config" not in case:
        return write(folder / "adapter.safetensors", adapter)
    peft = folder / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps(case["adapter_config"]))
    write(peft / "adapter_model.safetensors", adapter)
    return peft


def assert_close(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> None:
    expected = expected.double()
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    change = (expected - start.double()).norm()
    # The weight is float32: its rounding alone is eps·‖W‖ beside the change.
    rounding = torch.finfo(torch.float32).eps * start.double().norm()
    assert (found.double() - expected).norm() <= 1e-4 * change + rounding


def bake_case(  # also for the GPU
    tmp_path: Path, case: dict[str, object], options: tuple[str, ...], expected: str
) -> None:
    tensors = read(GOLDEN / str(case["file"]))
    base, path = write_base(tmp_path, tensors, str(case["module"]))
    adapter = write_adapter(tmp_path, case, tensors)
    output = tmp_path / "out.safetensors"
    succeed("bake", base, f"{adapter}:{case['strength']}", "-o", output, *options)
    found = read(output)
    assert_close(found[f"{path}.weight"], tensors[f"{expected}.weight"], tensors["base.weight"])
    if "expected.bias" in tensors:
        assert_close(found[f"{path}.bias"], tensors["expected.bias"], tensors["base.bias"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_case(case: dict[str, object], tmp_path: Path) -> None:
    contested = OTHER_READING.get(str(case["case"]), {"default": "expected"})
    bake_case(tmp_path, case, ("--device", "cpu"), str(contested["default"]))


@pytest.mark.parametrize("case", [c for c in CASES if c["case"] in OTHER_READING], ids=lambda c: c["case"])
def test_other_reading_of_a_contested_case(case: dict[str, object], tmp_path: Path) -> None:
    readings = OTHER_READING[str(case["case"])]
    other = "alternative" if readings["default"] == "expected" else "expected"
    bake_case(tmp_path, case, ("--device", "cpu", *readings[other]), other)


def test_every_contested_case_has_both_readings_tested() -> None:
    assert {case["case"] for case in CASES if case.get("contested")} == set(OTHER_READING)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["pair"])
def test_merge_pair(pair: dict[str, object], tmp_path: Path) -> None:
    tensors = read(GOLDEN / str(pair["file"]))
    base, path = write_base(tmp_path, tensors, str(pair["module"]))
    a = write(tmp_path / "a.safetensors", part(tensors, "a."))
    b = write(tmp_path / "b.safetensors", part(tensors, "b."))
    merged, baked = tmp_path / "merged.safetensors", tmp_path / "baked.safetensors"
    options = ["--base", base] if pair["needs_base"] else []
    succeed(
        "merge", f"{a}:{pair['weight_a']}", f"{b}:{pair['weight_b']}",
        "-o", merged, "--rebuild", "--dtype", "fp32", "--device", "cpu", *options,
    )  # fmt: skip
    succeed("bake", base, merged, "-o", baked, "--device", "cpu")
    found = read(baked)
    for name in ("weight", "bias"):
        if f"base.{name}" not in tensors:
            continue
        start = tensors[f"base.{name}"].double()
        expected = tensors.get(f"expected.delta.{name}", torch.zeros_like(start))
        scale = start.abs().max() + expected.abs().max()
        assert ((found[f"{path}.{name}"].double() - start) - expected).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize(
    "pair", [p for p in PAIRS if "concatenation" in p["structure"]], ids=lambda p: p["pair"]
)
def test_concatenated_rank_is_the_sum(pair: dict[str, object], tmp_path: Path) -> None:
    tensors = read(GOLDEN / str(pair["file"]))
    if "a." + str(pair["module"]) + ".lora_down.weight" not in tensors:
        assert "glora" in str(pair["pair"])
        return
    a = write(tmp_path / "a.safetensors", part(tensors, "a."))
    b = write(tmp_path / "b.safetensors", part(tensors, "b."))
    merged = tmp_path / "merged.safetensors"
    succeed("merge", a, b, "-o", merged, "--device", "cpu")
    down = f"{pair['module']}.lora_down.weight"
    assert read(merged)[down].shape[0] == tensors[f"a.{down}"].shape[0] + tensors[f"b.{down}"].shape[0]


RESIZE = json.loads((GOLDEN / "resize.json").read_text())["cases"]


@pytest.mark.parametrize("case", RESIZE, ids=lambda case: case["case"])
def test_delta_of_resize_case(case: dict[str, object], tmp_path: Path) -> None:
    tensors = read(GOLDEN / str(case["file"]))
    expected = tensors["expected.delta.weight"]
    path = checkpoint_path(str(case["module"]))
    zero = torch.zeros(expected.shape, dtype=torch.float64)
    base = write(tmp_path / "base.safetensors", {f"{path}.weight": zero})
    adapter = write(tmp_path / "adapter.safetensors", part(tensors, "adapter."))
    succeed("bake", base, adapter, "-o", tmp_path / "out.safetensors", "--device", "cpu")
    found = read(tmp_path / "out.safetensors")[f"{path}.weight"]
    # A float64 base is computed in float64, so the expected value's rounding to float32 remains.
    assert (found - expected).norm() <= torch.finfo(torch.float32).eps * expected.double().norm()


CONVERT = json.loads((GOLDEN / "convert" / "manifest.json").read_text())["groups"]
UNET_FILES = [
    (group, file) for group in CONVERT if group["group"] in ("sd1", "sdxl") for file in group["files"]
]


def layer_shapes(reference: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Weight shape by module of a reference file of LoRA modules."""
    modules = {key.removesuffix(".lora_up.weight") for key in reference if key.endswith(".lora_up.weight")}
    return {
        module: (
            reference[f"{module}.lora_up.weight"].shape[0],
            *reference[f"{module}.lora_down.weight"].shape[1:],
        )
        for module in modules
    }


def unet_base(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A float64 zero checkpoint with the reference file's layers, in diffusers' components."""
    components = {"lora_unet_": "unet.", "lora_te2_": "text_encoder_2.", "lora_te1_": "text_encoder.",
                  "lora_te_": "text_encoder."}  # fmt: skip
    state = {}
    for module, shape in layer_shapes(reference).items():
        prefix = next(p for p in components if module.startswith(p))
        key = f"{components[prefix]}{module.removeprefix(prefix)}.weight"
        state[key] = torch.zeros(shape, dtype=torch.float64)
    return state


@pytest.mark.parametrize(("group", "file"), UNET_FILES, ids=lambda v: v.get("file", v.get("group", "")))
def test_dialects_of_one_change_bake_alike(
    group: dict[str, str], file: dict[str, str], tmp_path: Path
) -> None:
    reference = read(GOLDEN / group["reference"])
    base = write(tmp_path / "base.safetensors", unet_base(reference))
    expected, found = tmp_path / "expected.safetensors", tmp_path / "found.safetensors"
    succeed("bake", base, GOLDEN / group["reference"], "-o", expected, "--strict", "--device", "cpu")
    # diffusers' formats have no alpha, which is a warning in kohya's: not `--strict` here.
    result = succeed("bake", base, GOLDEN / file["file"], "-o", found, "--json", "--device", "cpu")
    report = json.loads(result.stdout)["adapters"][0]
    assert report["matched"] == report["modules"]
    assert report["modules"] == len(file["module_map"])
    ours, theirs = read(found), read(expected)
    changed = [key for key in theirs if ours[key].any()]
    assert len(changed) == report["modules"]
    for key in changed:
        # Folding alpha or a core rounded the stored float32 factors once more.
        assert (ours[key] - theirs[key]).norm() <= 1e-6 * theirs[key].norm()


FLUX_FILES = [
    (group, file) for group in CONVERT if group["group"].startswith("flux") for file in group["files"]
]


@pytest.mark.parametrize(("group", "file"), FLUX_FILES, ids=lambda v: v.get("file", v.get("group", "")))
def test_flux_file_gives_the_reference_change(group: dict[str, str], file: dict[str, dict[str, str]]) -> None:
    """Too wide to bake in a test: factors are compared by what they do to two vectors."""
    reference, tensors = read(GOLDEN / group["reference"]), read(GOLDEN / str(file["file"]))
    theirs, ours = factors_by_place(reference), factors_by_place(tensors)
    rows = file.get("row_parts", {})
    compared = 0
    for module in {
        key.removesuffix(".lora_up.weight") for key in reference if key.endswith(".lora_up.weight")
    }:
        if module in rows:
            parts = [ours.pop(split_name(name).place) for name in rows[module]]
        elif split_name(module).place in ours:
            parts = [ours.pop(split_name(module).place)]
        else:
            continue  # a subset, or a name that only Flux' tables translate
        low = theirs[split_name(module).place]
        x = torch.randn(low.down.shape[1], 2, generator=torch.Generator().manual_seed(0))
        expected = low.up @ (low.down @ x)
        found = torch.cat([part.up @ (part.down @ x) for part in parts])
        # The files are bf16: the split one folded alpha into its factors and rounded again.
        assert (found - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()
        compared += 1
    assert compared


def factors_by_place(tensors: dict[str, torch.Tensor]) -> dict[tuple[str, str], LowRank]:
    found = {}
    for module in parse_keys(tensors, SLOT_NAMES).modules.values():
        slots = {slot: tensors[key].float() for slot, key in module.slots.items()}
        detected = detect({slot: tuple(tensor.shape) for slot, tensor in slots.items()})
        alpha = float(slots["alpha"]) if "alpha" in slots else None
        dims = detected.algorithm.dims(detected.layout, detected.sizes, alpha, DEFAULT_READING)
        low = detected.algorithm.factors(Bound(slots, detected.layout, detected.sizes, dims))
        found[split_name(module.name).place] = low
    return found
