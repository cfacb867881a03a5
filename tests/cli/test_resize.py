"""``lycotool resize`` as users type it, against dense SVDs in float64.

What a file changes is read by baking it into a float64 checkpoint of zeros, which computes in
float64; the reference is numpy's SVD of that dense matrix.

Tolerance. A truncation is two float32 products of the stored factors with ``r x k`` mixing
matrices, whose operands multiply to ``P = |c| ‖up‖ ‖down‖`` in Frobenius norm, summed over the
rank ``r`` and rounded once more on saving. :func:`rounding` is ``r√r`` sums times 4 for the two
factors of each of the two products, in float32, plus 2 roundings of ``√r`` columns in the saved
dtype. Truncation errors may differ from the optimum by that much.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, GOLDEN, read, run, succeed, write
from safetensors import safe_open
from test_golden import (
    CASES,
    OTHER_READING,
    RESIZE,
    assert_close,
    checkpoint_path,
    part,
    write_adapter,
    write_base,
)
from typer.testing import Result

from lycotool.linalg.ranks import RULES

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

A, B, C = "lora_unet_down_a", "lora_unet_down_b", "lora_unet_down_c"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Hundreds of small files whose survival of a power cut is not the question here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return tmp_path


@pytest.fixture
def normal(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator that is the same in every run of a test."""
    seed = int.from_bytes(hashlib.sha256(request.node.name.encode()).digest()[:4], "big")
    return torch.Generator().manual_seed(seed)


def module(
    name: str,
    shape: tuple[int, ...],
    rank: int,
    generator: torch.Generator,
    *,
    alpha: float | None = 1.0,
    decay: float = 1.0,
) -> Tensors:
    """A LoRA module over a weight of this shape; its ranks fade by ``decay``."""
    out, width, *kernel = shape
    fading = decay ** torch.arange(rank)
    tensors = {
        f"{name}.lora_up.weight": (torch.randn(out, rank, generator=generator) * fading).reshape(
            out, rank, *(1 for _ in kernel)
        ),
        f"{name}.lora_down.weight": torch.randn(rank, width, *kernel, generator=generator),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def resize(*arguments: object) -> Result:
    return succeed("resize", *arguments, "--device", "cpu")


def strict_json(text: str) -> dict[str, object]:
    """JSON as everyone else reads it: without Python's NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(text, parse_constant=refuse)
    assert isinstance(document, dict)
    return document


def report(*arguments: object) -> dict[str, object]:
    return strict_json(resize(*arguments, "--json").stdout)


def metadata(path: Path | str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def layer(name: str) -> str:
    """The checkpoint path whose flattened form is the module's."""
    return "model.diffusion_model." + name.removeprefix("lora_unet_").replace("_", ".")


def changes(adapter: Path | str, shapes: Shapes, *options: object) -> dict[str, np.ndarray]:
    """ΔW of each module in float64, flattened to ``(out, in·kernel)``."""
    zeros = {
        f"{layer(name)}.weight": torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
    }
    zeros |= {f"{layer(name)}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    write(Path("zeros.safetensors"), zeros)
    succeed(
        "bake", "zeros.safetensors", adapter, "-o", "baked.safetensors", "-f", "--device", "cpu", *options
    )
    baked = read(Path("baked.safetensors"))
    return {name: baked[f"{layer(name)}.weight"].flatten(1).numpy() for name in shapes}


def optimum(matrix: np.ndarray, rank: int) -> float:
    """The least error any matrix of this rank has."""
    return float(np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()))


def new_rank(tensors: Tensors, name: str) -> int:
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    assert down.shape[0] == up.shape[1]
    return down.shape[0]


def scale(tensors: Tensors, name: str) -> float:
    return float(tensors[f"{name}.alpha"]) / new_rank(tensors, name)


def rounding(tensors: Tensors, name: str, dtype: torch.dtype = torch.float32) -> float:
    """How far a truncation may be off; see above."""
    up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
    rank = down.shape[0]
    size = float(up.norm() * down.norm()) * (abs(scale(tensors, name)) if f"{name}.alpha" in tensors else 1)
    computed = 4 * rank * math.sqrt(rank) * torch.finfo(torch.float32).eps
    return (computed + 2 * math.sqrt(rank) * torch.finfo(dtype).eps) * size


def assert_best(before: Path | str, after: Path | str, shapes: Shapes, ranks: Mapping[str, int]) -> None:
    """Every module has its new rank, its old scale, and the least error of that rank."""
    old, new = read(Path(before)), read(Path(after))
    first, second = changes(before, shapes), changes(after, shapes)
    for name in shapes:
        assert new_rank(new, name) == ranks[name]
        if f"{name}.alpha" in old:
            assert scale(new, name) == pytest.approx(scale(old, name), rel=torch.finfo(torch.float32).eps)
        found = float(np.linalg.norm(second[name] - first[name]))
        allowed = rounding(old, name, new[f"{name}.lora_up.weight"].dtype)
        assert abs(found - optimum(first[name], ranks[name])) <= allowed


# --- the golden vectors --------------------------------------------------------------------

BY_NAME = {case["case"]: case for case in RESIZE}
FIXED = [(case["case"], fixed) for case in RESIZE for fixed in case["fixed"]]
DYNAMIC = [(case["case"], dynamic) for case in RESIZE for dynamic in case["dynamic"]]


def rule_id(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "rule" not in value:
        return str(value["rank"])
    return f"{value['rule']}{value['param']:g}-{value['max_rank']}"


def golden_resize(name: str, *options: object) -> tuple[Tensors, dict[str, object]]:
    """Resized tensors and the report."""
    adapter = write(Path("adapter.safetensors"), part(read(GOLDEN / BY_NAME[name]["file"]), "adapter."))
    to = ("--to", "lora") if name.startswith(("loha", "lokr")) else ()
    said = report(adapter, "-o", "resized.safetensors", "--dtype", "fp32", *to, *options)
    return read(Path("resized.safetensors")), said


def golden_error(name: str, tensors: Tensors) -> float:
    """Frobenius distance of ``c · up @ down`` to the expected change."""
    case = BY_NAME[name]
    expected = read(GOLDEN / case["file"])["expected.delta.weight"].double()
    up, down = (
        tensors[f"{case['module']}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down")
    )
    return float((scale(tensors, case["module"]) * up @ down - expected.flatten(1)).norm())


def golden_error_when_baked(name: str) -> float:
    """The same of the written file in a checkpoint of zeros."""
    case = BY_NAME[name]
    expected = read(GOLDEN / case["file"])["expected.delta.weight"].double()
    key = f"{checkpoint_path(case['module'])}.weight"
    write(Path("base.safetensors"), {key: torch.zeros_like(expected)})
    succeed("bake", "base.safetensors", "resized.safetensors", "-o", "baked.safetensors", "--device", "cpu")
    return float((read(Path("baked.safetensors"))[key] - expected).norm())


def golden_rounding(case: Mapping[str, object]) -> float:
    """The expected change is float32 and so are the factors, of a norm a few times as large."""
    return 2e-6 * float(str(case["fro_norm"]))


@pytest.mark.parametrize(("name", "fixed"), FIXED, ids=rule_id)
def test_golden_fixed_rank(name: str, fixed: dict[str, object]) -> None:
    case = BY_NAME[name]
    tensors, said = golden_resize(name, "--rank", fixed["rank"])
    rank = new_rank(tensors, case["module"])
    kept = fixed["kept"]
    assert rank == min(fixed["rank"], case["numerical_rank"] or fixed["rank"])
    assert abs(golden_error(name, tensors) - fixed["fro_error"]) <= golden_rounding(case)
    assert abs(golden_error_when_baked(name) - fixed["fro_error"]) <= golden_rounding(case)
    [module] = said["modules"]
    assert module["new_rank"] == rank
    if case["numerical_rank"]:
        # The values are of float32 factors in float64, found from squares: far inside 1e-9.
        assert module["kept_fro"] == pytest.approx(np.linalg.norm(kept) / case["fro_norm"], rel=1e-9)
        assert module["max_ratio"] == pytest.approx(kept[0] / kept[rank - 1], rel=1e-7)


@pytest.mark.parametrize(("name", "dynamic"), DYNAMIC, ids=rule_id)
def test_golden_dynamic_rank(name: str, dynamic: dict[str, object]) -> None:
    rule = ("--method", dynamic["rule"], "--param", dynamic["param"], "--rank", dynamic["max_rank"])
    tensors, _ = golden_resize(name, *rule)
    assert new_rank(tensors, BY_NAME[name]["module"]) == dynamic["rank"]
    assert abs(golden_error(name, tensors) - dynamic["fro_error"]) <= golden_rounding(BY_NAME[name])


@pytest.mark.parametrize(
    ("name", "dynamic"), [(n, d) for n, d in DYNAMIC if d["kohya_rank"] is not None], ids=rule_id
)
def test_golden_kohya_rank(name: str, dynamic: dict[str, object]) -> None:
    """The ranks of sd-scripts, which adds one; beyond the module's own they hold zeros."""
    rule = ("--method", dynamic["rule"], "--param", dynamic["param"], "--rank", dynamic["max_rank"])
    tensors, _ = golden_resize(name, *rule, "--compat", "kohya")
    assert new_rank(tensors, BY_NAME[name]["module"]) == dynamic["kohya_rank"]
    assert golden_error(name, tensors) <= dynamic["fro_error"] + golden_rounding(BY_NAME[name])


@pytest.mark.parametrize(
    ("method", "parameter"),
    [
        ("sv_knee", None),
        ("sv_cumulative_knee", None),
        ("threshold", 1.0),
        ("sv_rel_decrease", 0.6),
        ("sv_ratio", 1),
        ("sv_fro", 1),
    ],
)
@pytest.mark.parametrize("cap", [None, 2])
def test_every_other_method_reaches_its_rule(
    method: str, parameter: float | None, cap: int | None, in_folder: Path, normal: torch.Generator
) -> None:
    write(in_folder / "a.safetensors", module(A, (20, 16), 8, normal, alpha=2.0, decay=0.6))
    values = np.linalg.svd(changes("a.safetensors", {A: (20, 16)})[A], compute_uv=False)[:8]
    rule = RULES[method](torch.from_numpy(values.copy()), parameter or 0)
    options = [] if parameter is None else ["--param", parameter]
    options += [] if cap is None else ["--rank", cap]
    said = report("a.safetensors", "--method", method, *options, "-o", "b.safetensors")
    assert said["ranks"] == {str(rule if cap is None else min(rule, cap)): 1}


LOW_RANK = ("lora", "locon", "dylora", "sparse", "lora+diff_b", "loha", "lokr")
ROUND_TRIPS = [case for case in CASES if case["algorithm"] in LOW_RANK and case["dora_axis"] is None]
OTHERS = [case for case in CASES if case not in ROUND_TRIPS and "adapter_config" not in case]


def bake_expecting(case: dict[str, object], tensors: Tensors, adapter: Path, expected: str) -> None:
    base, path = write_base(Path(), tensors, str(case["module"]))
    succeed("bake", base, f"{adapter}:{case['strength']}", "-o", "baked.safetensors", "--device", "cpu")
    found = read(Path("baked.safetensors"))
    assert_close(found[f"{path}.weight"], tensors[f"{expected}.weight"], tensors["base.weight"])
    if "expected.bias" in tensors:
        assert_close(found[f"{path}.bias"], tensors["expected.bias"], tensors["base.bias"])


@pytest.mark.parametrize("case", ROUND_TRIPS, ids=lambda case: case["case"])
def test_golden_case_at_its_full_rank_is_unchanged(case: dict[str, object], in_folder: Path) -> None:
    """LoHa and LoKr become LoRA exactly, cores are folded exactly, the rest stays."""
    tensors = read(GOLDEN / str(case["file"]))
    adapter = write_adapter(in_folder, case, tensors)
    resize(adapter, "--rank", 9999, "--to", "lora", "--dtype", "fp32", "-o", "same.safetensors")
    resized = read(in_folder / "same.safetensors")
    assert not any(slot in key for key in resized for slot in ("hada_", "lokr_", "lora_mid"))
    expected = OTHER_READING.get(str(case["case"]), {"default": "expected"})["default"]
    bake_expecting(case, tensors, in_folder / "same.safetensors", str(expected))


@pytest.mark.parametrize("name", ["lora_linear_alpha_zero", "dylora_linear_blocks"])
def test_the_other_reading_is_written_into_alpha(name: str, in_folder: Path) -> None:
    case = next(case for case in CASES if case["case"] == name)
    tensors = read(GOLDEN / str(case["file"]))
    adapter = write_adapter(in_folder, case, tensors)
    resize(adapter, "--rank", 9999, *OTHER_READING[name]["expected"], "-o", "same.safetensors")
    bake_expecting(case, tensors, in_folder / "same.safetensors", "expected")


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case["case"])
def test_golden_case_without_a_rank_is_carried_over(
    case: dict[str, object], in_folder: Path, normal: torch.Generator
) -> None:
    """full, norm, (IA)³, rotations, and what the rules refuse: beside a LoRA that shrinks."""
    tensors = read(GOLDEN / str(case["file"]))
    extra = module("lora_unet_extra", (6, 5), 3, normal)
    write(in_folder / "mixed.safetensors", {**part(tensors, "adapter."), **extra})
    refused = case["algorithm"] in ("glora", "tlora", "loha", "lokr") or case["dora_axis"] is not None
    if refused:
        result = run("resize", "mixed.safetensors", "--rank", 1, "-o", "out.safetensors")
        assert result.exit_code == 9
        assert "--keep-refused" in result.stderr
    keep = ("--keep-refused",) if refused else ()
    said = report("mixed.safetensors", "--rank", 1, "-o", "out.safetensors", *keep)
    assert [m["name"] for m in said["modules"]] == ["lora_unet_extra"]
    assert sum(said["carried"].values()) == 1
    resized = read(in_folder / "out.safetensors")
    for key, tensor in part(tensors, "adapter.").items():
        assert resized[key].dtype == tensor.dtype
        assert torch.equal(resized[key], tensor)
    assert new_rank(resized, "lora_unet_extra") == 1
    expected = OTHER_READING.get(str(case["case"]), {"default": "expected"})["default"]
    bake_expecting(case, tensors, in_folder / "out.safetensors", str(expected))


# --- scale ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 1.0, 3.0, 8.0, 40.0, -3.0])
def test_alpha_keeps_the_scale(alpha: float | None, in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal, alpha=alpha))
    resize("a.safetensors", "--rank", 4, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert scale(resized, A) == pytest.approx(1.0 if alpha is None else alpha / 6, rel=1e-7)  # float32
    assert_best("a.safetensors", "b.safetensors", {A: (9, 7)}, {A: 4})


def test_alpha_zero_stays_zero(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal, alpha=0.0))
    result = resize("a.safetensors", "--rank", 4, "-o", "b.safetensors")
    assert "alpha 0 is read as no change" in result.stderr
    resized = read(in_folder / "b.safetensors")
    assert float(resized[f"{A}.alpha"]) == 0
    assert new_rank(resized, A) == 4


def test_one_element_alpha_and_a_rank_that_stays(in_folder: Path, normal: torch.Generator) -> None:
    tensors = {**module(A, (9, 7), 4, normal), f"{A}.alpha": torch.tensor([2.0])}
    write(in_folder / "a.safetensors", tensors)
    resize("a.safetensors", "--rank", 4, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert resized.keys() == tensors.keys()
    assert all(torch.equal(resized[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_of_a_peft_folder_is_folded(rslora: bool, in_folder: Path, normal: torch.Generator) -> None:
    folder = in_folder / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 4, "use_rslora": rslora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    up, down = torch.randn(9, 6, generator=normal), torch.randn(6, 7, generator=normal)
    name = "base_model.model.down.a"
    write(
        folder / "adapter_model.safetensors",
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
    )
    assert resize(folder, "--rank", 4).stdout == "peft-r4.safetensors\n"
    resized = read(in_folder / "peft-r4.safetensors")
    assert set(resized) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
    expected = 4 / (math.sqrt(6) if rslora else 6) * (up.double() @ down.double())
    found = resized[f"{name}.lora_B.weight"].double() @ resized[f"{name}.lora_A.weight"].double()
    # As `rounding` has it, and one more rounding where the scale is folded.
    size = float(expected.norm()) + float(up.norm() * down.norm()) * 4 / 6
    allowed = (4 * 6 * math.sqrt(6) + 3 * math.sqrt(6)) * torch.finfo(torch.float32).eps * size
    assert abs(float((found - expected).norm()) - optimum(expected.numpy(), 4)) <= allowed


def test_scale_in_diffusers_metadata_is_folded(in_folder: Path, normal: torch.Generator) -> None:
    down, up = torch.randn(4, 5, generator=normal), torch.randn(6, 4, generator=normal)
    config = {"unet.r": 4, "unet.lora_alpha": 2}
    write(
        in_folder / "a.safetensors",
        {"unet.down.a.lora_A.weight": down, "unet.down.a.lora_B.weight": up},
        {"lora_adapter_metadata": json.dumps(config)},
    )
    resize("a.safetensors", "--rank", 9999, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert "lora_adapter_metadata" not in metadata("b.safetensors")  # it would scale twice
    assert torch.equal(resized["unet.down.a.lora_B.weight"], up * 0.5)  # a power of two
    assert torch.equal(resized["unet.down.a.lora_A.weight"], down)


# --- kernels -------------------------------------------------------------------------------

KERNELS: dict[str, tuple[int, ...]] = {
    "lora_unet_linear": (12, 10),
    "lora_unet_pointwise": (12, 10, 1, 1),
    "lora_unet_square": (12, 10, 3, 3),
    "lora_unet_line": (12, 10, 3),
    "lora_unet_oblong": (12, 10, 1, 5),
    "lora_unet_cube": (8, 6, 3, 3, 3),
}


@pytest.mark.parametrize(
    "rule",
    [("--rank", 4, "--conv-rank", 2), ("--method", "sv_fro", "--param", 1, "--rank", 4, "--conv-rank", 2)],
    ids=["fixed", "as caps"],
)
def test_linear_and_conv_ranks_apart(
    rule: tuple[object, ...], in_folder: Path, normal: torch.Generator
) -> None:
    tensors: Tensors = {}
    for name, shape in KERNELS.items():
        tensors |= module(name, shape, 6, normal)
    write(in_folder / "a.safetensors", tensors)
    resize("a.safetensors", *rule, "-o", "b.safetensors")
    conv = {"lora_unet_square", "lora_unet_line", "lora_unet_oblong", "lora_unet_cube"}
    assert_best(
        "a.safetensors", "b.safetensors", KERNELS, {name: 2 if name in conv else 4 for name in KERNELS}
    )
    resized = read(in_folder / "b.safetensors")
    for name, (out, width, *kernel) in KERNELS.items():
        rank = new_rank(resized, name)
        assert resized[f"{name}.lora_up.weight"].shape == (out, rank, *(1 for _ in kernel))
        assert resized[f"{name}.lora_down.weight"].shape == (rank, width, *kernel)


def test_one_rank_is_for_both(in_folder: Path, normal: torch.Generator) -> None:
    shapes = {A: (9, 7), B: (9, 7, 3, 3)}
    write(in_folder / "a.safetensors", module(A, shapes[A], 5, normal) | module(B, shapes[B], 5, normal))
    resize("a.safetensors", "--rank", 3, "-o", "b.safetensors")
    assert_best("a.safetensors", "b.safetensors", shapes, {A: 3, B: 3})


@pytest.mark.parametrize(("rank", "shown"), [(4, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (3,), (3, 1, 2)], ids=str)
def test_a_core_is_folded(
    kernel: tuple[int, ...], rank: int, shown: int, in_folder: Path, normal: torch.Generator
) -> None:
    ones = (1,) * len(kernel)
    up = torch.randn(9, 4, generator=normal)
    core, down = torch.randn(4, 4, *kernel, generator=normal), torch.randn(4, 7, generator=normal)
    tensors = {
        f"{A}.lora_up.weight": up.reshape(9, 4, *ones),
        f"{A}.lora_mid.weight": core,
        f"{A}.lora_down.weight": down.reshape(4, 7, *ones),
        f"{A}.alpha": torch.tensor(2.0),
    }
    write(in_folder / "a.safetensors", tensors)
    said = report("a.safetensors", "--rank", rank, "-o", "b.safetensors")
    assert said["modules"][0]["new_rank"] == shown
    resized = read(in_folder / "b.safetensors")
    assert set(resized) == {f"{A}.{slot}" for slot in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert resized[f"{A}.lora_down.weight"].shape == (rank, 7, *kernel)
    expected = 0.5 * torch.einsum(
        "op, pqk, qi -> oik", up.double(), core.double().flatten(2), down.double()
    ).flatten(1)
    found = changes("b.safetensors", {A: (9, 7, *kernel)})[A]
    size = 0.5 * float(up.norm() * core.norm() * down.norm())
    # As `rounding` has it, once more for folding.
    allowed = (6 * 4 * 2 + 2 * 2) * torch.finfo(torch.float32).eps * size
    assert abs(np.linalg.norm(found - expected.numpy()) - optimum(expected.numpy(), rank)) <= allowed


# --- what stands beside the factors --------------------------------------------------------


def test_sparse_part_and_bias_are_carried(in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 5, normal, alpha=2.0)
    beside = {
        f"{A}.diff_b": torch.randn(9, generator=normal),
        f"{A}.bias_indices": torch.tensor([[0, 3, 8], [6, 1, 2]], dtype=torch.int16),
        f"{A}.bias_values": torch.randn(3, generator=normal),
        f"{A}.bias_size": torch.tensor([9, 7], dtype=torch.int16),
    }
    write(in_folder / "a.safetensors", {**tensors, **beside})
    resize("a.safetensors", "--rank", 2, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert resized.keys() == tensors.keys() | beside.keys()
    assert new_rank(resized, A) == 2
    for key, tensor in beside.items():
        assert resized[key].dtype == tensor.dtype
        assert torch.equal(resized[key], tensor)
    # ΔW = c (up @ down + sparse): the low-rank part alone is truncated.
    sparse = torch.zeros(9, 7, dtype=torch.float64)
    sparse[[0, 3, 8], [6, 1, 2]] = beside[f"{A}.bias_values"].double()
    shape = {A: (9, 7)}
    zeros = {f"{layer(A)}.weight": torch.zeros(9, 7).double(), f"{layer(A)}.bias": torch.zeros(9).double()}
    write(in_folder / "zeros.safetensors", zeros)
    succeed("bake", "zeros.safetensors", "b.safetensors", "-o", "baked.safetensors", "--device", "cpu")
    baked = read(in_folder / "baked.safetensors")
    assert torch.equal(baked[f"{layer(A)}.bias"], beside[f"{A}.diff_b"].double())
    low = baked[f"{layer(A)}.weight"] - 2 / 5 * sparse
    write(in_folder / "factors.safetensors", tensors)
    before = changes("factors.safetensors", shape)[A]
    found = np.linalg.norm(low.numpy() - before)
    assert abs(found - optimum(before, 2)) <= rounding(tensors, A)


def test_a_peft_bias_is_carried_and_scaled(in_folder: Path, normal: torch.Generator) -> None:
    """``lora_B.bias`` has the scale too, which the result folds."""
    folder = in_folder / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    bias = torch.randn(9, generator=normal)
    name = "base_model.model.down.a"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, 7, generator=normal),
        f"{name}.lora_B.weight": torch.randn(9, 4, generator=normal),
        f"{name}.lora_B.bias": bias,
    }
    write(folder / "adapter_model.safetensors", tensors)
    resize(folder, "--rank", 2, "-o", "b.safetensors")
    assert torch.equal(read(in_folder / "b.safetensors")[f"{name}.lora_B.bias"], 0.5 * bias)


def test_an_unknown_tensor_and_an_embedding_are_carried(in_folder: Path, normal: torch.Generator) -> None:
    beside = {
        "mystery.tensor": torch.randn(3, generator=normal).half(),
        "bundle_emb.cat.string_to_param.*": torch.randn(2, 8, generator=normal),
        "lora_unet_ghost.alpha": torch.tensor(3.0),
    }
    write(in_folder / "a.safetensors", {**module(A, (9, 7), 5, normal), **beside})
    result = resize("a.safetensors", "--rank", 2, "-o", "b.safetensors")
    assert "warning: a.safetensors: mystery.tensor" in result.stderr
    resized = read(in_folder / "b.safetensors")
    for key, tensor in beside.items():
        assert resized[key].dtype == tensor.dtype
        assert torch.equal(resized[key], tensor)
    strict = run("resize", "a.safetensors", "--rank", 2, "-o", "c.safetensors", "--strict")
    assert strict.exit_code == 5
    assert not (in_folder / "c.safetensors").exists()


def test_a_warning_says_what_became_of_an_unknown_tensor(in_folder: Path, normal: torch.Generator) -> None:
    """It is in the result, so it has not been left aside."""
    write(in_folder / "a.safetensors", {**module(A, (9, 7), 5, normal), "mystery.tensor": torch.ones(3)})
    result = resize("a.safetensors", "--rank", 2, "-o", "b.safetensors")
    assert "mystery.tensor" in read(in_folder / "b.safetensors")
    assert "left aside" not in result.stderr


# --- LoHa and LoKr -------------------------------------------------------------------------


def loha(name: str, generator: torch.Generator) -> Tensors:
    sides = {"w1_a": (9, 2), "w1_b": (2, 7), "w2_a": (9, 2), "w2_b": (2, 7)}
    tensors = {f"{name}.hada_{s}": torch.randn(*shape, generator=generator) for s, shape in sides.items()}
    return {**tensors, f"{name}.alpha": torch.tensor(1.0)}


def lokr(name: str, generator: torch.Generator) -> Tensors:
    tensors = {
        f"{name}.lokr_w1": torch.randn(3, 2, generator=generator),
        f"{name}.lokr_w2": torch.randn(4, 5, generator=generator),
    }
    return {**tensors, f"{name}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize("make", [loha, lokr])
def test_loha_and_lokr_are_refused_with_the_way_on(
    make: object, in_folder: Path, normal: torch.Generator
) -> None:
    write(in_folder / "a.safetensors", {**make(A, normal), **module(B, (6, 5), 3, normal)})
    result = run("resize", "a.safetensors", "--rank", 2)
    assert result.exit_code == 9
    assert result.stdout == ""
    assert "1 of 2 modules cannot be resized" in result.stderr
    assert f"{make.__name__}: 1 modules" in result.stderr
    hint = next(line for line in result.stderr.splitlines() if line.startswith("hint:"))
    assert "--to lora" in hint
    assert "--keep-refused" in hint
    assert not (in_folder / "a-r2.safetensors").exists()


@pytest.mark.parametrize(("make", "shape"), [(loha, (9, 7)), (lokr, (12, 10))])
@pytest.mark.parametrize("rank", [1, 3])
def test_loha_and_lokr_become_the_best_lora(
    make: object, shape: tuple[int, int], rank: int, in_folder: Path, normal: torch.Generator
) -> None:
    tensors = make(A, normal)
    said = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": make.__name__, "factor": 4, "preset": "full"}),
    }
    write(in_folder / "a.safetensors", tensors, said)
    resize("a.safetensors", "--rank", rank, "--to", "lora", "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert set(resized) == {f"{A}.{slot}" for slot in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert new_rank(resized, A) == rank
    before = changes("a.safetensors", {A: shape})[A]
    after = changes("b.safetensors", {A: shape})[A]
    size = math.prod(float(t.norm()) for key, t in tensors.items() if not key.endswith("alpha"))
    allowed = (4 * 4 * 2 + 2 * 2) * torch.finfo(torch.float32).eps * size  # rank 4 at most before
    assert abs(np.linalg.norm(after - before) - optimum(before, rank)) <= allowed
    found = metadata("b.safetensors")
    assert json.loads(found["ss_network_args"])["algo"] in ("lora", "locon")
    assert found["ss_network_dim"] == found["ss_network_alpha"] == str(rank)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lora_unet_down_blocks_0_resnets_0_conv1", (8, 6, 3, 3)),
        ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", (8, 6, 1, 1)),
    ],
)
def test_a_flattened_loha_convolution_gets_its_kernel_back(
    name: str, shape: tuple[int, ...], in_folder: Path, normal: torch.Generator
) -> None:
    """LyCORIS stores ``(out, in·9)``; a LoRA has to be a convolution to load."""
    columns = math.prod(shape[1:])
    sides = {"w1_a": (8, 2), "w1_b": (2, columns), "w2_a": (8, 2), "w2_b": (2, columns)}
    tensors = {f"{name}.hada_{s}": torch.randn(*size, generator=normal) for s, size in sides.items()}
    write(in_folder / "a.safetensors", {**tensors, f"{name}.alpha": torch.tensor(1.0)})
    resize("a.safetensors", "--rank", 4, "--conv-rank", 3, "--to", "lora", "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    rank = 3 if math.prod(shape[2:]) > 1 else 4
    assert resized[f"{name}.lora_down.weight"].shape == (rank, *shape[1:])
    assert resized[f"{name}.lora_up.weight"].shape == (8, rank, 1, 1)


def test_kept_modules_stand_beside_resized_ones(in_folder: Path, normal: torch.Generator) -> None:
    kept = {**loha(B, normal), **lokr(C, normal)}
    write(in_folder / "a.safetensors", {**module(A, (9, 7), 5, normal), **kept})
    said = report("a.safetensors", "--rank", 2, "--keep-refused", "-o", "b.safetensors")
    assert said["carried"] == {"loha": 1, "lokr": 1}
    resized = read(in_folder / "b.safetensors")
    assert all(torch.equal(resized[key], tensor) for key, tensor in kept.items())
    assert new_rank(resized, A) == 2


def test_a_mixed_file_reports_what_it_carries(in_folder: Path, normal: torch.Generator) -> None:
    """Two full, a norm, an (IA)³ and a rotation from the golden files, renamed apart."""
    mixed = module(A, (9, 7), 5, normal)
    for number, name in enumerate(
        ["full_linear_diff_b", "full_conv3x3_bf16", "norm_layernorm", "ia3_linear_out", "oft_linear"]
    ):
        case = next(case for case in CASES if case["case"] == name)
        for key, tensor in part(read(GOLDEN / str(case["file"])), "adapter.").items():
            mixed[key.replace(str(case["module"]), f"lora_unet_other_{number}")] = tensor
    write(in_folder / "a.safetensors", mixed)
    result = resize("a.safetensors", "--rank", 2, "-o", "b.safetensors")
    for words in (
        "2 full carried over",
        "1 norm carried over",
        "1 ia3 carried over",
        "1 diag-oft carried over",
    ):
        assert words in result.stderr
    resized = read(in_folder / "b.safetensors")
    assert resized.keys() == mixed.keys()
    for key, tensor in mixed.items():
        if not key.startswith(A):
            assert resized[key].dtype == tensor.dtype
            assert torch.equal(resized[key], tensor)


@pytest.mark.parametrize("slot", ["dora_scale", "glora"])
def test_dora_and_glora_are_refused(slot: str, in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 5, normal)
    if slot == "dora_scale":
        tensors[f"{A}.dora_scale"] = torch.ones(9, 1)
        reason = "magnitudes"
    else:
        case = next(case for case in CASES if case["case"] == "glora_linear")
        tensors |= part(read(GOLDEN / str(case["file"])), "adapter.")
        reason = "depends on the base weight"
    write(in_folder / "a.safetensors", tensors)
    for options in ((), ("--to", "lora")):
        result = run("resize", "a.safetensors", "--rank", 2, *options)
        assert result.exit_code == 9
        assert reason in result.stderr
    assert not (in_folder / "a-r2.safetensors").exists()


def test_nothing_to_resize_is_an_error(in_folder: Path) -> None:
    write(in_folder / "a.safetensors", {f"{A}.diff": torch.ones(4, 4), f"{B}.w_norm": torch.ones(4)})
    result = run("resize", "a.safetensors", "--rank", 2)
    assert result.exit_code == 5
    assert "no module in this file has a rank to resize" in result.stderr


# --- budgets -------------------------------------------------------------------------------


def many(count: int, generator: torch.Generator, *, alpha: float | None = 2.0) -> tuple[Tensors, Shapes]:
    """Modules of several shapes whose spectra fade at different speeds."""
    tensors: Tensors = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(count):
        name = f"lora_unet_layer_{number}"
        shapes[name] = [(48, 40), (24, 64), (32, 16, 3, 3)][number % 3]
        tensors |= module(name, shapes[name], 12, generator, alpha=alpha, decay=(0.95, 0.7, 0.5)[number % 3])
    return tensors, shapes


def error_of_file(before: Path | str, after: Path | str, shapes: Shapes) -> float:
    """``√(Σ ‖ΔW' - ΔW‖² / Σ ‖ΔW‖²)`` as measured in float64 from the two files."""
    first, second = changes(before, shapes), changes(after, shapes)
    lost = sum(float(((second[name] - first[name]) ** 2).sum()) for name in shapes)
    return math.sqrt(lost / sum(float((first[name] ** 2).sum()) for name in shapes))


@pytest.mark.parametrize(
    ("asked", "limit"),
    [("60000", 60000), ("60KB", 60000), ("0.1MB", 100000), ("90KiB", 92160), ("80 kb", 80000)],
)
def test_size_is_kept_and_used(asked: str, limit: int, in_folder: Path, normal: torch.Generator) -> None:
    tensors, shapes = many(18, normal)
    write(in_folder / "a.safetensors", tensors)
    said = report("a.safetensors", "--size", asked, "-o", "b.safetensors")
    size = (in_folder / "b.safetensors").stat().st_size
    assert size == said["bytes_after"]
    # What greedy may leave: one rank of the dearest module, and the room kept for the header.
    assert limit - 4 * (32 + 16 * 9) - 2 * 4096 <= size <= limit
    assert said["relative_error"] == pytest.approx(
        error_of_file("a.safetensors", "b.safetensors", shapes), rel=1e-5
    )  # float32 factors


def test_size_spreads_ranks_better_than_one_rank_for_all(in_folder: Path, normal: torch.Generator) -> None:
    tensors, _ = many(18, normal)
    write(in_folder / "a.safetensors", tensors)
    same = report("a.safetensors", "--rank", 5, "-o", "same.safetensors")
    spread = report("a.safetensors", "--size", same["bytes_after"], "-o", "spread.safetensors")
    assert spread["bytes_after"] <= same["bytes_after"]
    # Two thirds of the modules fade fast: giving their bytes to the rest saves at least a fifth.
    assert spread["relative_error"] < 0.8 * same["relative_error"]


def test_size_larger_than_the_file_keeps_everything(in_folder: Path, normal: torch.Generator) -> None:
    tensors, shapes = many(6, normal)
    write(in_folder / "a.safetensors", tensors)
    said = report("a.safetensors", "--size", "1GB", "-o", "b.safetensors")
    assert said["relative_error"] == 0
    assert_best("a.safetensors", "b.safetensors", shapes, dict.fromkeys(shapes, 12))


def size_case(name: str, generator: torch.Generator) -> tuple[Tensors, dict[str, str], tuple[object, ...]]:
    """Files whose result has more beside the factors than the input does, or something else."""
    tensors: Tensors = {}
    said: dict[str, str] = {}
    options: tuple[object, ...] = ()
    for number in range(120):
        layer_name = f"lora_unet_layer_{number}"
        if name == "LoKr to LoRA":
            tensors |= lokr(layer_name, generator)
            options = ("--to", "lora")
        elif name == "alpha missing":
            tensors |= module(layer_name, (12, 10), 6, generator, alpha=None)
        else:
            tensors |= module(layer_name, (12, 10), 6, generator)
        if name == "biases":
            tensors[f"{layer_name}.diff_b"] = torch.randn(12, generator=generator)
    if name == "carried, widened":
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
        tensors["lora_unet_whole.diff"] = torch.randn(100, 100, generator=generator).half()
        options = ("--dtype", "fp32")
    if name == "carried, narrowed":
        tensors["lora_unet_whole.diff"] = torch.randn(100, 100, generator=generator)
        options = ("--dtype", "fp16")
    if name == "a long comment":
        said["ss_training_comment"] = "x" * 6000
    return tensors, said, options


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "alpha missing",
        "biases",
        "LoKr to LoRA",
        "carried, widened",
        "carried, narrowed",
        "a long comment",
    ],
)
def test_size_counts_everything_in_the_file(name: str, in_folder: Path, normal: torch.Generator) -> None:
    tensors, said, options = size_case(name, normal)
    write(in_folder / "a.safetensors", tensors, said or None)
    whole = report("a.safetensors", "--rank", 9999, "-n", "-o", "b.safetensors", *options)["bytes_after"]
    least = report("a.safetensors", "--rank", 1, "-n", "-o", "b.safetensors", *options)["bytes_after"]
    limit = (whole + least) // 2
    size = report("a.safetensors", "--size", limit, "-o", "b.safetensors", *options)["bytes_after"]
    assert size <= limit
    # One rank of a module is at most 4 * 22 bytes; the rest is room for the header.
    assert size >= limit - 2 * 4096


@pytest.mark.parametrize("asked", ["1", "5KB"])
def test_a_size_below_rank_1_is_refused(asked: str, in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", many(18, normal)[0])
    result = run("resize", "a.safetensors", "--size", asked, "-o", "b.safetensors")
    assert result.exit_code == 5
    assert "too few: rank 1 of every module needs" in result.stderr
    assert not (in_folder / "b.safetensors").exists()


def test_the_size_named_in_the_refusal_is_enough(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", many(18, normal)[0])
    refusal = run("resize", "a.safetensors", "--size", "1").stderr
    needed = int(re.search(r"needs (\d+)", refusal)[1])
    assert run("resize", "a.safetensors", "--size", needed - 1).exit_code == 5
    # The rule stands in the metadata, where a longer number takes more room.
    said = report("a.safetensors", "--size", needed + 16, "-o", "b.safetensors")
    assert said["ranks"] == {"1": 18}
    assert said["bytes_after"] <= needed + 16


@pytest.mark.parametrize("error", [0.3, 0.05, 0.01, 0.001])
def test_error_is_kept_as_measured_from_the_files(
    error: float, in_folder: Path, normal: torch.Generator
) -> None:
    tensors, shapes = many(18, normal)
    write(in_folder / "a.safetensors", tensors)
    said = report("a.safetensors", "--error", error, "-o", "b.safetensors")
    measured = error_of_file("a.safetensors", "b.safetensors", shapes)
    # The saved factors are float32: rank 12 in norms as `rounding` has them, here below 1e-5.
    assert measured <= error + 1e-5
    assert said["relative_error"] <= error
    assert said["relative_error"] == pytest.approx(measured, abs=1e-5)


def test_error_takes_no_rank_too_many(in_folder: Path, normal: torch.Generator) -> None:
    """Modules of one shape: then no file with fewer ranks is within the error."""
    tensors: Tensors = {}
    shapes = {f"lora_unet_layer_{number}": (20, 16) for number in range(8)}
    for number, (name, shape) in enumerate(shapes.items()):
        tensors |= module(name, shape, 8, normal, alpha=float(number + 1), decay=0.6)
    write(in_folder / "a.safetensors", tensors)
    said = report("a.safetensors", "--error", 0.1, "-o", "b.safetensors")
    before = changes("a.safetensors", shapes)
    squares = sorted(
        (float(v) ** 2 for matrix in before.values() for v in np.linalg.svd(matrix, compute_uv=False)[:8]),
        reverse=True,
    )
    fewest = next(n for n in range(len(squares)) if sum(squares[n:]) <= 0.1**2 * sum(squares))
    assert sum(m["new_rank"] for m in said["modules"]) == max(fewest, 8)
    assert len({m["new_rank"] for m in said["modules"]}) > 1  # larger alphas get more


def test_error_zero_loses_nothing(in_folder: Path, normal: torch.Generator) -> None:
    """Rank 3 stored with rank 6: the second half repeats the first."""
    tensors = module(A, (9, 7), 3, normal, alpha=None)
    up, down = tensors[f"{A}.lora_up.weight"], tensors[f"{A}.lora_down.weight"]
    doubled = {
        f"{A}.lora_up.weight": torch.cat([up, up], 1),
        f"{A}.lora_down.weight": torch.cat([down, down]),
    }
    write(in_folder / "a.safetensors", doubled)
    resize("a.safetensors", "--error", 0, "-o", "b.safetensors")
    shape = {A: (9, 7)}
    before, after = changes("a.safetensors", shape)[A], changes("b.safetensors", shape)[A]
    assert np.linalg.norm(after - before) <= rounding(doubled, A)


# --- dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype, in_folder: Path, normal: torch.Generator) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in module(A, (9, 7), 5, normal, alpha=4.0).items()}
    write(in_folder / "a.safetensors", tensors)
    resize("a.safetensors", "--rank", 3, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert {t.dtype for key, t in resized.items() if not key.endswith(".alpha")} == {dtype}
    new, old = changes("b.safetensors", {A: (9, 7)})[A], changes("a.safetensors", {A: (9, 7)})[A]
    assert abs(np.linalg.norm(new - old) - optimum(old, 3)) <= rounding(tensors, A, dtype)
    # 2.4 is no half: alpha is stored wide enough to keep the scale.
    assert scale(resized, A) == pytest.approx(4 / 5, rel=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("option", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_dtype_asked_for_is_saved(
    option: str, dtype: torch.dtype, in_folder: Path, normal: torch.Generator
) -> None:
    other = torch.float16 if dtype == torch.float32 else torch.float32
    tensors = {**module(A, (9, 7), 5, normal), f"{B}.diff": torch.randn(4, 4, generator=normal)}
    write(in_folder / "a.safetensors", {key: tensor.to(other) for key, tensor in tensors.items()})
    resize("a.safetensors", "--rank", 3, "--dtype", option, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    assert {t.dtype for key, t in resized.items() if not key.endswith(".alpha")} == {dtype}


def test_values_beyond_the_dtype_are_refused(in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 5, normal)
    tensors[f"{A}.lora_up.weight"] *= 1e5
    write(in_folder / "a.safetensors", tensors)
    result = run("resize", "a.safetensors", "--rank", 3, "--dtype", "fp16")
    assert result.exit_code == 6
    assert "65504" in result.stderr
    assert not (in_folder / "a-r3.safetensors").exists()


# --- metadata ------------------------------------------------------------------------------

SAID = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_dim": "6",
    "ss_network_alpha": "3",
    "ss_network_args": json.dumps({"algo": "locon", "conv_dim": "6", "conv_alpha": "3", "preset": "full"}),
    "ss_training_comment": "my cat",
    "ss_output_name": "cat",
    "sshs_model_hash": "0xstale",
    "sshs_legacy_hash": "stale",
    "modelspec.hash_sha256": "0xstale",
}


def test_metadata_is_true_for_the_result(in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 6, normal, alpha=3.0) | module(B, (9, 7, 3, 3), 6, normal, alpha=3.0)
    write(in_folder / "a.safetensors", tensors, SAID)
    resize("a.safetensors", "--rank", 4, "--conv-rank", 2, "-o", "b.safetensors")
    found = metadata("b.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2")
    assert found["ss_output_name"] == "cat"
    assert "2: 1" in found["ss_training_comment"]
    assert "4: 1" in found["ss_training_comment"]
    assert found["ss_training_comment"].endswith("my cat")
    assert "modelspec.hash_sha256" not in found
    assert json.loads(found["lycotool.resize"])["ranks"] == {"2": 1, "4": 1}
    content = (in_folder / "b.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert re.fullmatch("[0-9a-f]{8}", found["sshs_legacy_hash"])


def test_network_arguments_are_true_for_the_result(in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 6, normal, alpha=3.0) | module(B, (9, 7, 3, 3), 6, normal, alpha=3.0)
    write(in_folder / "a.safetensors", tensors, SAID)
    resize("a.safetensors", "--rank", 4, "--conv-rank", 2, "-o", "b.safetensors")
    arguments = json.loads(metadata("b.safetensors")["ss_network_args"])
    assert (arguments["algo"], arguments["preset"]) == ("locon", "full")
    assert (float(arguments["conv_dim"]), float(arguments["conv_alpha"])) == (2, 1)


def test_several_ranks_are_dynamic_and_listed(in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 6, normal, decay=0.3) | module(B, (9, 7), 6, normal)
    write(in_folder / "a.safetensors", tensors, SAID)
    said = report("a.safetensors", "--method", "sv_fro", "--param", 0.9, "-o", "b.safetensors")
    assert len(said["ranks"]) == 2
    found = metadata("b.safetensors")
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "Dynamic"
    for rank, count in said["ranks"].items():
        assert f"{rank}: {count}" in found["ss_training_comment"]


def test_metadata_of_a_file_that_had_none(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal, alpha=3.0))
    resize("a.safetensors", "--rank", 4, "-o", "b.safetensors")
    found = metadata("b.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2")
    assert found["lycotool.version"]


# --- output --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (("--rank", 2), "style-r2"),
        (("--rank", 2, "--conv-rank", 1), "style-r2-c1"),
        (("--rank", 2, "--conv-rank", 2), "style-r2"),
        (("--method", "sv_fro", "--param", 0.9), "style-sv_fro0.9"),
        (("--method", "sv_ratio", "--param", 10, "--rank", 2), "style-sv_ratio10"),
        (("--method", "sv_knee"), "style-sv_knee"),
        (("--size", "32MB"), "style-32000000B"),
        (("--error", 0.05), "style-error0.05"),
    ],
    ids=str,
)
def test_default_names(rule: tuple[object, ...], name: str, in_folder: Path, normal: torch.Generator) -> None:
    (in_folder / "loras").mkdir()
    write(in_folder / "loras" / "style.safetensors", module(A, (9, 7), 4, normal))
    assert resize("loras/style.safetensors", *rule).stdout == f"{name}.safetensors\n"
    assert (in_folder / f"{name}.safetensors").exists()


def test_dry_run_writes_nothing_and_says_the_same(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", many(6, normal)[0])
    for rule in (("--rank", 4), ("--error", 0.1), ("--size", "30KB")):
        plan = report("a.safetensors", *rule, "-n", "-o", "b.safetensors")
        assert sorted(path.name for path in in_folder.iterdir()) == ["a.safetensors"]
        done = report("a.safetensors", *rule, "-o", "b.safetensors")
        assert (plan.pop("dry_run"), done.pop("dry_run")) == (True, False)
        assert plan == done
        (in_folder / "b.safetensors").unlink()
    assert resize("a.safetensors", "--rank", 4, "-n").stdout == ""


def test_json_report(in_folder: Path, normal: torch.Generator) -> None:
    shapes = {A: (9, 7), B: (9, 7, 3, 3)}
    tensors = module(A, shapes[A], 6, normal, alpha=-3.0) | module(B, shapes[B], 5, normal)
    write(in_folder / "a.safetensors", {**tensors, f"{C}.diff": torch.ones(3, 3)})
    said = report("a.safetensors", "--rank", 4, "--conv-rank", 2, "-o", "b.safetensors")
    assert set(said) == {
        "schema_version", "outputs", "modules", "carried", "ranks", "relative_error",
        "bytes_before", "bytes_after", "warnings", "dry_run",
    }  # fmt: skip
    assert said["schema_version"] == 1
    assert said["outputs"] == ["b.safetensors"]
    assert said["carried"] == {"full": 1}
    assert said["ranks"] == {"2": 1, "4": 1}
    assert said["bytes_before"] == (in_folder / "a.safetensors").stat().st_size
    assert said["bytes_after"] == (in_folder / "b.safetensors").stat().st_size
    assert said["warnings"] == []
    before = changes("a.safetensors", shapes)
    for entry, rank in zip(said["modules"], (4, 2), strict=True):
        assert set(entry) == {"name", "type", "old_rank", "new_rank", "kept_fro", "kept_sum", "max_ratio"}
        values = np.linalg.svd(before[entry["name"]], compute_uv=False)[: entry["old_rank"]]
        assert (entry["type"], entry["new_rank"]) == ("lora", rank)
        # Both sides are float64 of the same float32 factors; squares cost half the digits.
        assert entry["kept_fro"] == pytest.approx(
            np.linalg.norm(values[:rank]) / np.linalg.norm(values), rel=1e-9
        )
        assert entry["kept_sum"] == pytest.approx(values[:rank].sum() / values.sum(), rel=1e-7)
        assert entry["max_ratio"] == pytest.approx(values[0] / values[rank - 1], rel=1e-7)
    assert said["relative_error"] == pytest.approx(
        error_of_file("a.safetensors", "b.safetensors", shapes), rel=1e-5
    )  # float32 factors


@pytest.mark.parametrize(
    "rule",
    [("--rank", 2), ("--method", "sv_fro", "--param", 0.5, "--rank", 5, "--compat", "kohya"), ("--error", 0)],
    ids=str,
)
def test_the_report_of_zeros_is_json(rule: tuple[object, ...], in_folder: Path) -> None:
    """A module of zeros has no ratio of values, which JSON has no infinity to say."""
    zeros = {f"{A}.lora_up.weight": torch.zeros(9, 4), f"{A}.lora_down.weight": torch.ones(4, 7)}
    one = {f"{B}.lora_up.weight": torch.ones(9, 1), f"{B}.lora_down.weight": torch.ones(1, 7)}
    write(in_folder / "a.safetensors", {**zeros, **one})
    said = report("a.safetensors", *rule, "-o", "b.safetensors")
    assert said["relative_error"] == 0
    assert not changes("b.safetensors", {A: (9, 7)})[A].any()


def test_every_module_is_reported_on_demand(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal) | module(B, (9, 7), 5, normal))
    result = resize("a.safetensors", "--rank", 2, "--modules", "-o", "b.safetensors")
    assert f"{A}: lora: rank 6 -> 2, kept " in result.stderr
    assert f"{B}: lora: rank 5 -> 2, kept " in result.stderr
    assert "modules by rank 2: 2" in result.stderr
    assert re.search(r"relative error [0-9.]+%; [0-9.]+ (B|KiB) -> [0-9.]+ (B|KiB)", result.stderr)
    assert resize("a.safetensors", "--rank", 2, "-q", "-o", "c.safetensors").stderr == ""


def test_same_inputs_same_bytes(in_folder: Path, normal: torch.Generator) -> None:
    tensors = many(9, normal)[0] | {**loha(A, normal), **lokr(B, normal)}
    write(in_folder / "a.safetensors", tensors)
    for name in ("one", "two"):
        resize("a.safetensors", "--error", 0.2, "--to", "lora", "-o", f"{name}.safetensors")
    assert (in_folder / "one.safetensors").read_bytes() == (in_folder / "two.safetensors").read_bytes()


def test_a_resized_file_resizes_to_the_same_change(in_folder: Path, normal: torch.Generator) -> None:
    """Truncations nest: 6 to 4 to 2 is 6 to 2."""
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal, decay=0.6))
    resize("a.safetensors", "--rank", 4, "-o", "b.safetensors")
    resize("b.safetensors", "--rank", 2, "-o", "c.safetensors")
    assert_best("a.safetensors", "c.safetensors", {A: (9, 7)}, {A: 2})


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("unet.down.a", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.down.a", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.down.a", "lora_down.weight", "lora_up.weight"),
        ("unet.down.a", "lora.down.weight", "lora.up.weight"),
        ("base_model.model.down.a", "lora_A.default.weight", "lora_B.default.weight"),
    ],
    ids=lambda text: text,
)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_spelling_is_kept(
    prefix: str, down: str, up: str, alpha: float | None, in_folder: Path, normal: torch.Generator
) -> None:
    tensors = {
        f"{prefix}.{down}": torch.randn(6, 7, generator=normal),
        f"{prefix}.{up}": torch.randn(9, 6, generator=normal),
    }
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    write(in_folder / "a.safetensors", tensors)
    resize("a.safetensors", "--rank", 2, "-o", "b.safetensors")
    resized = read(in_folder / "b.safetensors")
    added = {f"{prefix}.alpha"} if down == "lora_down.weight" and alpha is None else set()
    assert resized.keys() == tensors.keys() | added
    dense = tensors[f"{prefix}.{up}"].double() @ tensors[f"{prefix}.{down}"].double()
    expected = (1 if alpha is None else alpha / 6) * dense
    found = resized[f"{prefix}.{up}"].double() @ resized[f"{prefix}.{down}"].double()
    if f"{prefix}.alpha" in resized:
        found = found * float(resized[f"{prefix}.alpha"]) / 2
    size = float(tensors[f"{prefix}.{up}"].norm() * tensors[f"{prefix}.{down}"].norm())
    allowed = (4 * 6 * math.sqrt(6) + 2 * math.sqrt(6)) * torch.finfo(torch.float32).eps * size
    assert abs(float((found - expected).norm()) - optimum(expected.numpy(), 2)) <= allowed


def test_standard_input_is_an_adapter(in_folder: Path, normal: torch.Generator) -> None:
    content = write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal)).read_bytes()
    named = run("resize", "-", "--rank", 2, "-o", "b.safetensors", input=content)
    assert named.exit_code == 0, named.stderr
    assert_best("a.safetensors", "b.safetensors", {A: (9, 7)}, {A: 2})
    assert run("resize", "-", "--rank", 2, input=content).exit_code == 2  # no name to derive from


@pytest.mark.parametrize("adapter", ["lora", "loha"])
def test_sample_files(adapter: str, in_folder: Path) -> None:
    """354 modules of an SD 1.x, linear and convolution, in fp16."""
    said = report(DATA / f"{adapter}.safetensors", "--rank", 2, "--to", "lora")
    assert len(said["modules"]) == 354
    assert said["outputs"] == [f"{adapter}-r2.safetensors"]
    bytes_after = (in_folder / f"{adapter}-r2.safetensors").stat().st_size
    assert said["bytes_after"] == bytes_after


# --- slicing -------------------------------------------------------------------------------


def dylora(generator: torch.Generator, *, dim: int = 32) -> tuple[Tensors, Shapes]:
    shapes = {A: (9, 7), B: (8, 6, 3, 3)}
    tensors: Tensors = {}
    for name, shape in shapes.items():
        tensors |= module(name, shape, dim, generator, alpha=16.0)
    return {**tensors, f"{A}.diff_b": torch.randn(9, generator=generator)}, shapes


DYLORA = {"ss_network_module": "networks.dylora", "ss_network_dim": "32", "ss_network_alpha": "16"}


@pytest.mark.parametrize("compat", ["none", "kohya"])
def test_split_gives_one_file_for_each_unit(compat: str, in_folder: Path, normal: torch.Generator) -> None:
    tensors, shapes = dylora(normal)
    write(in_folder / "dy.safetensors", tensors, DYLORA)
    result = resize("dy.safetensors", "--split", "--unit", 4, "--compat", compat)
    names = [f"dy-r{rank}.safetensors" for rank in range(4, 33, 4)]
    assert len(names) == 8
    assert result.stdout.splitlines() == names
    for rank, name in zip(range(4, 33, 4), names, strict=True):
        sliced = read(in_folder / name)
        assert sliced.keys() == tensors.keys()
        found = changes(name, shapes)
        for module_name in shapes:
            up, down = (tensors[f"{module_name}.lora_{side}.weight"] for side in ("up", "down"))
            assert torch.equal(sliced[f"{module_name}.lora_up.weight"], up[:, :rank])
            assert torch.equal(sliced[f"{module_name}.lora_down.weight"], down[:rank])
            # The scale of training stays; sd-scripts leaves alpha instead.
            c = 16 / 32 if compat == "none" else 16 / rank
            assert scale(sliced, module_name) == c
            product = up[:, :rank].flatten(1).double() @ down[:rank].flatten(1).double()
            # Both in float64, over at most 32 products of numbers below 5.
            assert np.abs(found[module_name] - c * product.numpy()).max() <= 1e-12
        assert torch.equal(sliced[f"{A}.diff_b"], tensors[f"{A}.diff_b"])
    assert all(torch.equal(read(in_folder / names[-1])[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("compat", ["none", "kohya"])
def test_split_metadata_is_true_for_each_file(compat: str, in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0], {**DYLORA, "sshs_model_hash": "0xstale"})
    resize("dy.safetensors", "--split", "--unit", 8, "--compat", compat)
    for rank in (8, 16, 24, 32):
        path = in_folder / f"dy-r{rank}.safetensors"
        found = metadata(path)
        assert found["ss_network_dim"] == str(rank)
        assert float(found["ss_network_alpha"]) == float(read(path)[f"{A}.alpha"])
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert found["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


def test_split_of_a_training_by_lycoris(in_folder: Path, normal: torch.Generator) -> None:
    """LyCORIS scaled by alpha over the number of blocks; the option writes that into alpha."""
    tensors, _ = dylora(normal, dim=8)
    write(in_folder / "dy.safetensors", tensors)
    resize("dy.safetensors", "--split", "--unit", 4, "--dylora-block-size", 4)
    for rank in (4, 8):
        assert scale(read(in_folder / f"dy-r{rank}.safetensors"), A) == 16 / (8 / 4)


def test_split_into_a_folder_and_json(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0], DYLORA)
    (in_folder / "out").mkdir()
    arguments = ("dy.safetensors", "--split", "--unit", 16, "-o", "out")
    plan = report(*arguments, "-n")
    assert list((in_folder / "out").iterdir()) == []
    done = report(*arguments)
    outputs = [str(Path("out") / f"dy-r{rank}.safetensors") for rank in (16, 32)]
    assert done["outputs"] == plan["outputs"] == outputs
    assert done["bytes_after"] == sum((in_folder / name).stat().st_size for name in outputs)
    assert done["bytes_after"] == plan["bytes_after"]


def test_split_makes_its_folder(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0], DYLORA)
    arguments = ("dy.safetensors", "--split", "--unit", 16, "-o", "new/out")
    plan = report(*arguments, "-n")
    assert [path.name for path in in_folder.iterdir()] == ["dy.safetensors"]
    done = report(*arguments)
    assert done["outputs"] == plan["outputs"]
    resize("dy.safetensors", "--split", "--unit", 16)
    for name in ("dy-r16.safetensors", "dy-r32.safetensors"):
        assert (in_folder / "new" / "out" / name).read_bytes() == (in_folder / name).read_bytes()
    assert sorted(path.name for path in (in_folder / "new").rglob("*")) == [
        "dy-r16.safetensors",
        "dy-r32.safetensors",
        "out",
    ]


@pytest.mark.parametrize("above", [[], ["new"]], ids=["both are new", "one is there"])
def test_split_takes_its_folder_away_again(
    above: list[str], in_folder: Path, normal: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0])
    for name in above:
        (in_folder / name).mkdir()

    def fails(*arguments: object) -> None:
        assert (in_folder / "new" / "out").is_dir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lycotool.ops._slices.publish_all", fails)
    result = run("resize", "dy.safetensors", "--split", "--unit", 16, "-o", "new/out")
    assert result.exit_code == 7
    assert "no space left on device" in result.stderr
    assert sorted(path.name for path in in_folder.rglob("*")) == ["dy.safetensors", *above]


@pytest.mark.parametrize("dry", [(), ("-n",)], ids=["run", "dry run"])
def test_split_below_a_file(dry: tuple[str, ...], in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0])
    (in_folder / "file").touch()
    result = run("resize", "dy.safetensors", "--split", "--unit", 16, "-o", "file/new/out", *dry)
    assert result.exit_code == 7
    assert "file: is not a folder" in result.stderr


def test_split_refuses_any_existing_file_before_it_writes(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0])
    (in_folder / "dy-r24.safetensors").write_bytes(b"old")
    result = run("resize", "dy.safetensors", "--split", "--unit", 8)
    assert result.exit_code == 7
    assert "dy-r24.safetensors" in result.stderr
    assert sorted(path.name for path in in_folder.iterdir()) == ["dy-r24.safetensors", "dy.safetensors"]
    assert (in_folder / "dy-r24.safetensors").read_bytes() == b"old"
    resize("dy.safetensors", "--split", "--unit", 8, "--force")
    assert len(read(in_folder / "dy-r24.safetensors")) == 7


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--unit", 5), "--unit 5 does not divide the rank of 2 modules"),
        (("--unit", 64), "--unit 64 does not divide"),
        (("--unit", 0), "--unit"),
        (("--unit", -4), "--unit"),
        ((), "--unit"),
        (("--unit", 4, "-o", "dy.safetensors"), "`-o` names a folder"),
        (("--unit", 4, "-o", "absent.safetensors"), "`-o` names a folder"),
        (("--unit", 4, "-o", "-"), "`-o` names a folder"),
    ],
    ids=str,
)
def test_split_usage(
    options: tuple[object, ...], text: str, in_folder: Path, normal: torch.Generator
) -> None:
    write(in_folder / "dy.safetensors", dylora(normal)[0])
    result = run("resize", "dy.safetensors", "--split", *options)
    assert result.exit_code == 2
    assert text in result.stderr
    assert [path.name for path in in_folder.iterdir()] == ["dy.safetensors"]


def test_split_refuses_what_it_cannot_slice(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "dy.safetensors", {**dylora(normal)[0], **loha(C, normal)})
    result = run("resize", "dy.safetensors", "--split", "--unit", 4)
    assert result.exit_code == 9
    assert "1 loha" in result.stderr


# --- wrong arguments and bad files ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "nothing says which rank"),
        (("--conv-rank", 2), "nothing says which rank"),
        (("--rank", 0), "--rank is 0"),
        (("--rank", -1), "--rank is -1"),
        (("--rank", 4, "--conv-rank", 0), "--conv-rank is 0"),
        (("--rank", "two"), "expected a whole number"),
        (("--method", "sv_magic", "--param", 1), "sv_magic"),
        (("--method", "sv_fro"), "`--method sv_fro` needs `--param`"),
        (("--method", "sv_fro", "--param", 5), "above 0 and at most 1"),
        (("--method", "sv_fro", "--param", 0), "above 0 and at most 1"),
        (("--method", "sv_fro", "--param", "nan"), "above 0 and at most 1"),
        (("--method", "sv_cumulative", "--param", 1.01), "above 0 and at most 1"),
        (("--method", "sv_cumulative", "--param", -0.5), "above 0 and at most 1"),
        (("--method", "sv_ratio", "--param", 0.5), "at least 1"),
        (("--method", "sv_rel_decrease", "--param", 2), "above 0 and at most 1"),
        (("--method", "threshold", "--param", -1), "at least 0"),
        (("--method", "sv_knee", "--param", 1), "takes no --param"),
        (("--rank", 4, "--param", 0.5), "takes no --param"),
        (("--size", "1MB", "--error", 0.1), "exclude each other"),
        (("--size", "1MB", "--method", "sv_fro", "--param", 0.9), "exclude each other"),
        (("--error", 0.1, "--method", "sv_fro", "--param", 0.9), "exclude each other"),
        (("--size", "0"), "--size is 0"),
        (("--size", "lots"), "lots is no size"),
        (("--size", "3 parsecs"), "3 parsecs is no size"),
        (("--size", "-1MB"), "-1MB is no size"),
        (("--error", 1), "--error is 1"),
        (("--error", -0.1), "--error is -0.1"),
        (("--error", "nan"), "--error is nan"),
        (("--method", "sv_knee", "--compat", "kohya"), "sd-scripts has no method sv_knee"),
        (("--rank", 4, "--to", "loha"), "loha"),
        (("--rank", 4, "-o", "out.foo"), "unknown output format"),
        (("--rank", 4, "--device", "abacus"), "abacus"),
    ],
    ids=str,
)
def test_usage(options: tuple[object, ...], text: str, in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal))
    result = run("resize", "a.safetensors", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in result.stderr
    assert [path.name for path in in_folder.iterdir()] == ["a.safetensors"]


def test_a_rank_above_the_layer_is_clamped(in_folder: Path, normal: torch.Generator) -> None:
    tensors = module(A, (9, 7), 6, normal) | module(B, (9, 7), 12, normal)
    write(in_folder / "a.safetensors", tensors)
    result = resize("a.safetensors", "--rank", 9999, "-o", "b.safetensors")
    assert re.search("2 of 2 modules .*clamped", result.stderr)
    assert_best("a.safetensors", "b.safetensors", {A: (9, 7), B: (9, 7)}, {A: 6, B: 7})


@pytest.mark.parametrize(
    ("rank", "conv_rank", "clamped"), [(8, 2, False), (4, 9999, True), (9999, 2, True)], ids=str
)
def test_clamping_is_said_of_the_rank_that_applies(
    rank: int, conv_rank: int, clamped: bool, in_folder: Path, normal: torch.Generator
) -> None:
    """The convolution has rank 4 and the linear layer 8; each is judged by its own option."""
    write(in_folder / "a.safetensors", module(A, (9, 9), 8, normal) | module(B, (9, 7, 3, 3), 4, normal))
    result = resize("a.safetensors", "--rank", rank, "--conv-rank", conv_rank, "-o", "b.safetensors")
    assert ("clamped" in result.stderr) == clamped


@pytest.mark.parametrize(
    ("value", "slot", "text"),
    [
        (float("nan"), "lora_up.weight", "NaN"),
        (float("inf"), "lora_down.weight", "Inf"),
        (float("nan"), "alpha", "alpha"),
        (float("nan"), "diff_b", "NaN"),
    ],
)
@pytest.mark.parametrize("rank", [2, 6])
def test_numbers_that_are_none_are_refused(
    value: float, slot: str, text: str, rank: int, in_folder: Path, normal: torch.Generator
) -> None:
    tensors = {**module(A, (9, 7), 6, normal), f"{A}.diff_b": torch.zeros(9)}
    tensors[f"{A}.{slot}"].reshape(-1)[0] = value
    write(in_folder / "a.safetensors", tensors)
    result = run("resize", "a.safetensors", "--rank", rank)
    assert result.exit_code == 6
    assert text in result.stderr
    assert A in result.stderr
    assert not (in_folder / f"a-r{rank}.safetensors").exists()


def test_files_that_are_no_adapter(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "model.safetensors", {"model.diffusion_model.down.a.weight": torch.ones(3, 3)})
    result = run("resize", "model.safetensors", "--rank", 2)
    assert result.exit_code == 5
    assert "no adapter modules" in result.stderr
    assert run("resize", "absent.safetensors", "--rank", 2).exit_code == 2
    tensors = module(A, (9, 7), 6, normal)
    del tensors[f"{A}.lora_down.weight"]
    write(in_folder / "half.safetensors", tensors)
    half = run("resize", "half.safetensors", "--rank", 2)
    assert half.exit_code == 3
    assert "lora_down" in half.stderr


def test_an_existing_output_is_refused(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", module(A, (9, 7), 6, normal))
    (in_folder / "a-r2.safetensors").write_bytes(b"old")
    result = run("resize", "a.safetensors", "--rank", 2)
    assert result.exit_code == 7
    assert (in_folder / "a-r2.safetensors").read_bytes() == b"old"
    resize("a.safetensors", "--rank", 2, "--force")
    assert new_rank(read(in_folder / "a-r2.safetensors"), A) == 2
    before = (in_folder / "a.safetensors").read_bytes()
    onto_itself = run("resize", "a.safetensors", "--rank", 2, "-o", "a.safetensors", "--force")
    assert onto_itself.exit_code == 7
    assert (in_folder / "a.safetensors").read_bytes() == before


def test_an_error_is_json_on_demand(in_folder: Path, normal: torch.Generator) -> None:
    write(in_folder / "a.safetensors", loha(A, normal))
    result = run("resize", "a.safetensors", "--rank", 2, "--json")
    assert result.exit_code == 9
    assert result.stdout == ""
    assert "--to lora" in strict_json(result.stderr)["error"]["hint"]
