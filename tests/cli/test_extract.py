"""``lycotool extract`` as users type it.

What a file says is worked out here a second time, in float64, from the tensors that were
written; `bake` closes the circle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checkpoint, lora, read, run, succeed, write
from makers import architectures as arch
from makers.ldm_names import clip_to_ldm, unet_to_ldm, with_prefix
from safetensors import safe_open
from torch import Tensor

Tensors = dict[str, Tensor]

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."

LINEAR = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
POINT = f"{UNET}input_blocks.1.1.proj_in"
CONV = f"{UNET}input_blocks.1.0.in_layers.2"
NORM = f"{UNET}input_blocks.1.0.in_layers.0"
EMBEDDING = f"{TEXT}embeddings.token_embedding"
TEXT_LINEAR = f"{TEXT}encoder.layers.0.mlp.fc1"
TEXT_NORM = f"{TEXT}final_layer_norm"

#: What sd-scripts and LyCORIS call them.
NAMES = {
    LINEAR: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    POINT: "lora_unet_down_blocks_0_attentions_0_proj_in",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
    NORM: "lora_unet_down_blocks_0_resnets_0_norm1",
    EMBEDDING: "lora_te_text_model_embeddings_token_embedding",
    TEXT_LINEAR: "lora_te_text_model_encoder_layers_0_mlp_fc1",
    TEXT_NORM: "lora_te_text_model_final_layer_norm",
}
MATRICES = (LINEAR, POINT, CONV, TEXT_LINEAR)

EPS = torch.finfo(torch.float32).eps

#: Differences are taken in float32 from weights about three times as large, so that each is
#: off by up to 3·eps/2 on either side; shares of squares double that. 16 eps leaves a margin.
SHARES = 16 * EPS


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- models and files ----------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed + 1000 * sum(shape)))


def model() -> Tensors:
    """One layer of every kind, under the names of an SD 1.x single file."""
    shapes = {
        f"{LINEAR}.weight": (24, 40),
        f"{POINT}.weight": (24, 20, 1, 1),
        f"{POINT}.bias": (24,),
        f"{CONV}.weight": (24, 20, 3, 3),
        f"{CONV}.bias": (24,),
        f"{NORM}.weight": (20,),
        f"{NORM}.bias": (20,),
        f"{EMBEDDING}.weight": (50, 24),
        f"{TEXT_LINEAR}.weight": (48, 24),
        f"{TEXT_LINEAR}.bias": (48,),
        f"{TEXT_NORM}.weight": (24,),
        f"{TEXT_NORM}.bias": (24,),
        f"{VAE}decoder.conv_in.weight": (8, 4, 3, 3),
    }
    tensors = {key: normal(*shape, seed=index) for index, (key, shape) in enumerate(shapes.items())}
    return {**tensors, f"{TEXT}embeddings.position_ids": torch.arange(7)[None]}


def tuned_model(base: Tensors, keys: Iterable[str] | None = None, scale: float = 0.3) -> Tensors:
    """``base`` with noise on these tensors, on all floating ones by default.

    The noise has falling singular values, so that ranks matter.
    """
    tuned = dict(base)
    for index, key in enumerate(base if keys is None else keys):
        tensor = base[key]
        if tensor.is_floating_point():
            noise = normal(*tensor.shape, seed=100 + index).to(tensor.dtype)
            if tensor.ndim > 1:
                noise = noise * (0.8 ** torch.arange(len(noise))).reshape(-1, *[1] * (tensor.ndim - 1))
            tuned[key] = (tensor + scale * noise).to(tensor.dtype)
    return tuned


def extract(base: Tensors, tuned: Tensors, *options: object) -> tuple[dict, Tensors]:
    """Run the command on two single files; the report and the adapter's tensors."""
    write(Path("base.safetensors"), base)
    write(Path("tuned.safetensors"), tuned)
    result = succeed(
        "extract", "base.safetensors", "tuned.safetensors", "-o", "out.safetensors", "--force", "--json", *options
    )  # fmt: skip
    return json.loads(result.stdout), read(Path("out.safetensors"))


def refuse(base: Tensors, tuned: Tensors, *options: object) -> tuple[int, str]:
    """Run the command on two single files; the exit code and the message. Nothing is written."""
    write(Path("base.safetensors"), base)
    write(Path("tuned.safetensors"), tuned)
    result = run("extract", "base.safetensors", "tuned.safetensors", "-o", "out.safetensors", *options)
    assert not Path("out.safetensors").exists()
    assert not result.stdout
    return result.exit_code, result.stderr


def bake(base: Tensors, adapter: Tensors) -> Tensors:
    write(Path("clean.safetensors"), base)
    write(Path("adapter.safetensors"), adapter)
    succeed("bake", "clean.safetensors", "adapter.safetensors", "-o", "baked.safetensors", "--force")
    return read(Path("baked.safetensors"))


# --- what an adapter says, worked out in float64 -------------------------------------------


def slots_of(adapter: Tensors, module: str) -> Tensors:
    """A module's tensors by slot, floating ones in float64."""
    found = {k.removeprefix(f"{module}."): t for k, t in adapter.items() if k.startswith(f"{module}.")}
    return {k: t.double() if t.is_floating_point() else t for k, t in found.items()}


def weight_change(slots: Tensors, base: Tensor) -> Tensor:
    """``ΔW`` of one module by the formulas of the format."""
    if "w_norm" in slots or "diff" in slots:
        return slots.get("w_norm", slots.get("diff"))
    if "on_input" in slots:
        shape = [1] * base.ndim
        shape[int(slots["on_input"])] = -1
        return slots["weight"].reshape(shape) * base
    if "lokr_w1" in slots:
        scale, w2 = 1.0, slots.get("lokr_w2")
        if w2 is None:
            w2 = slots["lokr_w2_a"] @ slots["lokr_w2_b"].flatten(1)
            scale = float(slots["alpha"]) / len(slots["lokr_w2_b"])
        product = np.kron(slots["lokr_w1"].numpy(), w2.flatten(1).numpy())
        return scale * torch.from_numpy(product).reshape(base.shape)
    if "lora_up.weight" not in slots:
        return torch.zeros_like(base)
    up, down = slots["lora_up.weight"].flatten(1), slots["lora_down.weight"]
    if "lora_mid.weight" in slots:
        change = torch.einsum("pq..., op, qi -> oi...", slots["lora_mid.weight"], up, down.flatten(1))
    else:
        change = up @ down.flatten(1)
    change = change.reshape(len(up), -1)
    if "bias_values" in slots:
        rows, columns = slots["bias_indices"].long() % 65536
        change[rows, columns] += slots["bias_values"]
    change = (float(slots["alpha"]) / len(down) * change).reshape(base.shape)
    if "dora_scale" in slots:
        axis = 0 if slots["dora_scale"].shape[0] == len(base) else 1
        v = base + change
        others = [dim for dim in range(base.ndim) if dim != axis]
        change = slots["dora_scale"] * v / v.square().sum(others, keepdim=True).sqrt() - base
    return change


def changes(adapter: Tensors, base: Tensors, names: Mapping[str, str] = NAMES) -> Tensors:
    """The change of every checkpoint tensor that a module stands for, in float64."""
    found: Tensors = {}
    for layer, module in names.items():
        slots = slots_of(adapter, module)
        if not slots:
            continue
        weight = base[f"{layer}.weight"].double()
        found[f"{layer}.weight"] = weight_change(slots, weight).reshape(weight.shape)
        for slot in ("diff_b", "b_norm"):
            if slot in slots:
                found[f"{layer}.bias"] = slots[slot]
    known = {key.split(".")[0] for key in adapter}
    assert known <= set(names.values()), known - set(names.values())
    return found


def square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def covered(base: Tensors) -> list[str]:
    """What an adapter is about: floating tensors outside the VAE."""
    return [key for key, tensor in base.items() if tensor.is_floating_point() and not key.startswith(VAE)]


def assert_report_is_true(report: dict, base: Tensors, tuned: Tensors, adapter: Tensors) -> None:
    """Captured shares, by component and overall, and each module's, recomputed from the files."""
    found = changes(adapter, base)
    total, left = dict.fromkeys(("unet", "te1"), 0.0), dict.fromkeys(("unet", "te1"), 0.0)
    for key in covered(base):
        delta = tuned[key].double() - base[key].double()
        component = "unet" if key.startswith(UNET) else "te1"
        total[component] += square(delta)
        left[component] += square(delta - found.get(key, 0))
    expected = {component: 1 - left[component] / total[component] for component in total if total[component]}
    expected["all"] = 1 - sum(left.values()) / sum(total.values())
    assert report["captured"].keys() == expected.keys()
    assert report["captured"] == pytest.approx(expected, abs=SHARES)
    assert report["relative_error"] ** 2 == pytest.approx(1 - expected["all"], abs=SHARES)
    for module in report["modules"]:
        key = f"{module['layer']}.weight"
        assert module["name"] == NAMES[module["layer"]]
        delta = tuned[key].double() - base[key].double()
        assert module["norm"] == pytest.approx(math.sqrt(square(delta)), rel=SHARES)
        if not delta.any():  # only the bias differs
            assert module["captured"] == 1
            continue
        share = 1 - square(delta - found[key]) / square(delta)
        assert module["captured"] ** 2 == pytest.approx(share, abs=SHARES)


def assert_baking_gives_the_tuned_model(
    report: dict, base: Tensors, tuned: Tensors, adapter: Tensors
) -> None:
    """Within the reported relative error of the difference, and rounding the result."""
    baked = bake(base, adapter)
    keys = covered(base)
    missing = math.sqrt(sum(square(baked[key].double() - tuned[key].double()) for key in keys))
    whole = math.sqrt(sum(square(tuned[key].double() - base[key].double()) for key in keys))
    rounding = EPS * math.sqrt(sum(square(tuned[key]) for key in keys))
    allowed = (report["relative_error"] + SHARES) * whole + rounding
    assert missing <= allowed


def singular_values(base: Tensors, tuned: Tensors, layer: str) -> np.ndarray:
    delta = tuned[f"{layer}.weight"].double() - base[f"{layer}.weight"].double()
    return np.linalg.svd(delta.flatten(1).numpy(), compute_uv=False)


def ranks(report: dict) -> dict[str, int]:
    """Rank by layer, of the modules that have one."""
    return {m["layer"]: m["rank"] for m in report["modules"] if m["rank"] is not None}


# --- round trips: adapter -> checkpoint -> adapter -----------------------------------------


def lora_on(layer: str, base: Tensors, rank: int, *, core: bool = False, seed: int = 0) -> Tensors:
    """A LoRA or LoCon on a layer, with an alpha other than its rank."""
    weight, module = base[f"{layer}.weight"], NAMES[layer]
    out, width, *kernel = weight.shape
    ones = [1] * len(kernel)
    shapes = {"lora_up": (out, rank, *ones), "lora_down": (rank, width, *(ones if core else kernel))}
    if core:
        shapes["lora_mid"] = (rank, rank, *kernel)
    tensors = {f"{module}.{slot}.weight": 0.3 * normal(*shape, seed=seed) for slot, shape in shapes.items()}
    return {**tensors, f"{module}.alpha": torch.tensor(rank / 2)}


def lokr_on(layer: str, base: Tensors, first: tuple[int, int], rank: int | None) -> Tensors:
    weight, module = base[f"{layer}.weight"], NAMES[layer]
    out, width, *kernel = weight.shape
    b, d = out // first[0], width // first[1]
    tensors = {f"{module}.lokr_w1": normal(*first)}
    if rank is None:
        tensors[f"{module}.lokr_w2"] = 0.2 * normal(b, d, *kernel)
        return tensors
    tensors[f"{module}.lokr_w2_a"] = 0.3 * normal(b, rank)
    tensors[f"{module}.lokr_w2_b"] = normal(rank, d * math.prod(kernel))
    return {**tensors, f"{module}.alpha": torch.tensor(rank / 2)}


def assert_round_trip(base: Tensors, adapter: Tensors, *options: object) -> tuple[dict, Tensors]:
    """Extracting what was baked gives the adapter's changes back."""
    tuned = bake(base, adapter)
    report, found = extract(base, tuned, *options)
    expected, actual = changes(adapter, base), changes(found, base)
    assert actual.keys() == expected.keys()
    for key, change in expected.items():
        # Baking rounds the weight to float32; the factors are rounded as often as they are
        # used, and with the change's norm below that of the weight.
        size = math.sqrt(square(tuned[key]) + square(change))
        assert math.sqrt(square(actual[key] - change)) <= 8 * EPS * size, key
    assert_report_is_true(report, base, tuned, found)
    return report, found


@pytest.mark.parametrize("layer", MATRICES, ids=NAMES.get)
@pytest.mark.parametrize("rank", [1, 4])
def test_lora_round_trip(layer: str, rank: int) -> None:
    base = model()
    report, found = assert_round_trip(base, lora_on(layer, base, rank), "--rank", rank)
    assert ranks(report) == {layer: rank}
    slots = slots_of(found, NAMES[layer])
    assert slots.keys() == {"lora_up.weight", "lora_down.weight", "alpha"}
    kernel = base[f"{layer}.weight"].shape[2:]
    assert slots["lora_up.weight"].shape[2:] == (1,) * len(kernel)
    assert slots["lora_down.weight"].shape[2:] == kernel
    assert slots["alpha"].shape == ()
    assert float(slots["alpha"]) == rank


def test_lora_round_trip_of_a_wide_layer() -> None:
    """Above the size up to which matrices are decomposed exactly."""
    base = model() | {f"{LINEAR}.weight": normal(260, 320)}
    assert_round_trip(base, lora_on(LINEAR, base, 6), "--rank", "6")


@pytest.mark.parametrize("rank", [2, 5])
def test_cp_round_trip(rank: int) -> None:
    base = model()
    adapter = lora_on(CONV, base, rank, core=True) | lora_on(LINEAR, base, rank)
    report, found = assert_round_trip(base, adapter, "--rank", rank, "--use-conv-cp")
    slots = slots_of(found, NAMES[CONV])
    assert slots["lora_mid.weight"].shape == (rank, rank, 3, 3)
    assert slots["lora_down.weight"].shape == (rank, 20, 1, 1)
    assert "lora_mid.weight" not in slots_of(found, NAMES[LINEAR])
    assert {m["layer"]: m["type"] for m in report["modules"]} == {LINEAR: "lora", CONV: "lora (cp)"}


@pytest.mark.parametrize(
    ("layer", "first"), [(LINEAR, (4, 4)), (POINT, (4, 4)), (CONV, (4, 4)), (TEXT_LINEAR, (4, 4))], ids=str
)
@pytest.mark.parametrize("rank", [None, 2])
def test_lokr_round_trip(layer: str, first: tuple[int, int], rank: int | None) -> None:
    base = model()
    options = ("--factor", "4", *(() if rank is None else ("--rank", rank)))
    _, found = assert_round_trip(base, lokr_on(layer, base, first, rank), "--algo", "lokr", *options)
    slots = slots_of(found, NAMES[layer])
    assert slots["lokr_w1"].shape == first
    assert ("lokr_w2" in slots) == (rank is None)
    if rank is not None:
        assert slots["lokr_w2_a"].shape[1] == slots["lokr_w2_b"].shape[0] == rank


def test_lokr_without_a_factor_splits_most_equally() -> None:
    base = model()
    adapter = lokr_on(LINEAR, base, (4, 5), None) | lokr_on(CONV, base, (4, 4), None)
    assert_round_trip(base, adapter, "--algo", "lokr", "--factor", "-1")


@pytest.mark.parametrize(
    "slots",
    [
        {f"{NAMES[LINEAR]}.diff": (24, 40), f"{NAMES[CONV]}.diff": (24, 20, 3, 3)},
        {f"{NAMES[CONV]}.diff": (24, 20, 3, 3), f"{NAMES[CONV]}.diff_b": (24,)},
        {f"{NAMES[POINT]}.diff_b": (24,), f"{NAMES[TEXT_LINEAR]}.diff_b": (48,)},
        {f"{NAMES[NORM]}.w_norm": (20,), f"{NAMES[NORM]}.b_norm": (20,)},
        {f"{NAMES[NORM]}.w_norm": (20,), f"{NAMES[TEXT_NORM]}.w_norm": (24,)},
        {f"{NAMES[EMBEDDING]}.diff": (50, 24)},
    ],
    ids=["full", "full with bias", "bias alone", "norm", "norm without bias", "embedding"],
)
@pytest.mark.parametrize("algo", ["full", "lora", "lokr", "dora", "ia3"])
def test_differences_round_trip(slots: dict[str, tuple[int, ...]], algo: str) -> None:
    """Norms, biases and embeddings are stored as they are, whatever the algorithm for matrices."""
    adapter = {key: 0.2 * normal(*shape) for key, shape in slots.items()}
    if algo != "full" and any(key.endswith(".diff") for key in slots) and NAMES[EMBEDDING] not in str(slots):
        algo = "full"
    _, found = assert_round_trip(model(), adapter, "--algo", algo)
    assert found.keys() == adapter.keys()
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == slots


def test_a_norm_whose_bias_alone_differs() -> None:
    base = model()
    tuned = tuned_model(base, [f"{NORM}.bias"])
    _, adapter = extract(base, tuned)
    assert torch.equal(bake(base, adapter)[f"{NORM}.bias"], tuned[f"{NORM}.bias"])


@pytest.mark.parametrize("layer", [LINEAR, POINT, CONV], ids=NAMES.get)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_round_trip(layer: str, axis: str) -> None:
    base = model()
    weight = base[f"{layer}.weight"]
    adapter = lora_on(layer, base, 2)
    adapter[f"{NAMES[layer]}.lora_up.weight"] *= 0.3  # a change of a fifth of the weight or so
    dim = 0 if axis == "out" else 1
    others = [d for d in range(weight.ndim) if d != dim]
    norms = weight.square().sum(others, keepdim=True).sqrt()
    adapter[f"{NAMES[layer]}.dora_scale"] = norms * (
        1 + 0.3 * torch.rand(norms.shape, generator=generator(3))
    )
    tuned = bake(base, adapter)

    report, found = extract(base, tuned, "--algo", "dora", "--dora-axis", axis, "--rank", "2")

    key = f"{layer}.weight"
    assert found[f"{NAMES[layer]}.dora_scale"].shape == norms.shape
    # X is known up to a scale of W + X per channel, so the weights are compared. The search
    # ends where rounding of W' to float32 stops it; see tests/linalg/test_direction.py.
    rebuilt = base[key].double() + changes(found, base)[key]
    assert math.sqrt(square(rebuilt - tuned[key])) <= 32 * EPS * math.sqrt(square(tuned[key]))
    assert_report_is_true(report, base, tuned, found)
    assert_baking_gives_the_tuned_model(report, base, tuned, found)


@pytest.mark.parametrize("layer", MATRICES, ids=NAMES.get)
@pytest.mark.parametrize("axis", [0, 1], ids=["out", "in"])
def test_ia3_round_trip(layer: str, axis: int) -> None:
    base = model()
    shape = base[f"{layer}.weight"].shape
    vector = 0.3 * normal(shape[axis])
    stored = vector.reshape([1, -1] + [1] * (len(shape) - 2)) if len(shape) > 2 else vector
    adapter = {f"{NAMES[layer]}.weight": stored, f"{NAMES[layer]}.on_input": torch.tensor(axis)}
    report, found = assert_round_trip(base, adapter, "--algo", "ia3")
    assert found[f"{NAMES[layer]}.weight"].shape == stored.shape
    assert found[f"{NAMES[layer]}.on_input"] == axis
    assert report["modules"][0]["type"] == "ia3"


def test_ia3_of_layers_on_different_axes_with_biases() -> None:
    base = model()
    tuned = tuned_model(base, [f"{POINT}.bias", f"{NORM}.weight"])
    tuned[f"{POINT}.weight"] = base[f"{POINT}.weight"] * torch.linspace(0.5, 2, 24)[:, None, None, None]
    tuned[f"{CONV}.weight"] = base[f"{CONV}.weight"] * torch.linspace(0.5, 2, 20)[None, :, None, None]
    report, adapter = extract(base, tuned, "--algo", "ia3")
    assert_report_is_true(report, base, tuned, adapter)
    assert_baking_gives_the_tuned_model(report, base, tuned, adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ia3_of_checkpoints_rounded_to_half(dtype: torch.dtype) -> None:
    """Rounding the scaled weights is no reason to refuse."""
    base = {key: t.to(dtype) if t.is_floating_point() else t for key, t in model().items()}
    tuned = dict(base)
    scale = torch.linspace(0.7, 1.4, 24)[:, None]
    tuned[f"{LINEAR}.weight"] = (base[f"{LINEAR}.weight"].float() * scale).to(dtype)
    report, _ = extract(base, tuned, "--algo", "ia3", "--dtype", "fp32")
    # What is missing is that rounding: eps/2 of the weight, beside a change of a fifth of it.
    assert report["relative_error"] <= 5 * torch.finfo(dtype).eps


# --- round trips: checkpoint -> adapter -> checkpoint --------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "3"),
        ("--rank", "6", "--conv-rank", "2"),
        ("--rank", "100"),
        ("--rank", "4", "--use-conv-cp"),
        ("--rank", "3", "--sparse-bias", "--sparsity", "0.9"),
        ("--rank", "6", "--clamp-quantile", "0.98"),
        ("--rank", "6", "--dtype", "fp16"),
        ("--rank", "6", "--dtype", "bf16"),
        ("--rank", "6", "--dtype", "fp8_e4m3fn"),
        ("--mode", "fro", "--param", "0.9", "--dtype", "fp16"),
        ("--mode", "full"),
        ("--mode", "error", "--error", "0.2"),
        ("--mode", "size", "--size", "20kB"),
        ("--algo", "full"),
        ("--algo", "full", "--dtype", "fp16"),
        ("--algo", "lokr", "--factor", "4"),
        ("--algo", "lokr", "--rank", "2"),
        ("--algo", "dora", "--rank", "4"),
        ("--algo", "dora", "--rank", "4", "--dora-axis", "in"),
    ],
    ids=" ".join,
)
def test_what_is_reported_is_what_was_written(options: tuple[str, ...]) -> None:
    """A model that differs everywhere: shares recomputed from the file, and baked back."""
    base = model()
    tuned = tuned_model(base)

    report, adapter = extract(base, tuned, *options)

    assert_report_is_true(report, base, tuned, adapter)
    assert_baking_gives_the_tuned_model(report, base, tuned, adapter)
    assert report["nbytes"] == Path("out.safetensors").stat().st_size
    assert {key.split(".")[0] for key in adapter} == set(NAMES.values())


def test_full_is_exact() -> None:
    base = model()
    tuned = tuned_model(base)
    _, adapter = extract(base, tuned, "--algo", "full")
    baked = bake(base, adapter)
    for key in covered(base):
        # tuned - base rounds once, adding it to base once more.
        assert (baked[key] - tuned[key]).abs().max() <= 2 * EPS * tuned[key].abs().max()


def test_rank_of_half_the_layer_or_more_still_factors() -> None:
    """LyCORIS stores the whole difference from half the output channels on."""
    base = model()
    tuned = tuned_model(base, [f"{layer}.weight" for layer in MATRICES])
    for rank in (12, 23, 24, 500):
        report, adapter = extract(base, tuned, "--rank", rank)
        assert not [key for key in adapter if key.endswith(".diff")]
        assert ranks(report) == {
            layer: min(rank, *base[f"{layer}.weight"].flatten(1).shape) for layer in MATRICES
        }


# --- modes ---------------------------------------------------------------------------------

Rule = Callable[[np.ndarray, float], int]


def first_reaching(weights: np.ndarray, share: float) -> int:
    """Smallest count whose sum is the share, tried one after the other."""
    for count in range(1, len(weights) + 1):
        if weights[:count].sum() >= share * weights.sum():
            return count
    return len(weights)


RULES: dict[str, Rule] = {
    "threshold": lambda values, least: sum(value > least for value in values),
    "ratio": lambda values, share: sum(value >= share * values[0] for value in values),
    "quantile": first_reaching,
    "fro": lambda values, share: first_reaching(values**2, share**2),
}


@pytest.mark.parametrize(
    ("mode", "parameter"),
    [
        ("threshold", 0.5), ("threshold", 1.3), ("ratio", 0.1), ("ratio", 0.5), ("quantile", 0.5),
        ("quantile", 0.9), ("fro", 0.5), ("fro", 0.9), ("fro", 0.99), ("fro", 1.0),
    ],
)  # fmt: skip
def test_each_mode_picks_the_smallest_rank_that_meets_its_target(mode: str, parameter: float) -> None:
    base = model()
    tuned = tuned_model(base)
    report, adapter = extract(base, tuned, "--mode", mode, "--param", parameter)
    expected = {
        layer: max(1, RULES[mode](singular_values(base, tuned, layer), parameter)) for layer in MATRICES
    }
    assert ranks(report) == expected
    assert {layer: len(adapter[f"{NAMES[layer]}.lora_down.weight"]) for layer in MATRICES} == expected


def test_a_parameter_apart_for_convolutions() -> None:
    base = model()
    tuned = tuned_model(base)
    report, _ = extract(base, tuned, "--mode", "fro", "--param", "0.95", "--conv-param", "0.4")
    for layer, rank in ranks(report).items():
        share = 0.4 if layer == CONV else 0.95  # a 1x1 convolution is a linear layer
        assert rank == RULES["fro"](singular_values(base, tuned, layer), share)


@pytest.mark.parametrize(
    "mode",
    [
        ("--mode", "fro", "--param", "0.99"),
        ("--mode", "error", "--error", "0.01"),
        ("--mode", "size", "--size", "1MB"),
    ],
    ids=lambda mode: mode[1],
)
def test_rank_and_conv_rank_cap_the_other_modes(mode: tuple[str, ...]) -> None:
    base = model()
    report, _ = extract(base, tuned_model(base), *mode, "--rank", "3", "--conv-rank", "2")
    assert all(rank <= (2 if layer == CONV else 3) for layer, rank in ranks(report).items()), ranks(report)


def test_conv_rank_is_for_kernels_larger_than_one() -> None:
    base = model()
    report, _ = extract(base, tuned_model(base), "--rank", "5", "--conv-rank", "2")
    assert ranks(report) == {LINEAR: 5, POINT: 5, CONV: 2, TEXT_LINEAR: 5}


def test_fixed_truncation_is_the_best_of_its_rank() -> None:
    base = model()
    tuned = tuned_model(base)
    report, _ = extract(base, tuned, "--rank", "4")
    for module in report["modules"]:
        if module["rank"] is not None:
            values = singular_values(base, tuned, module["layer"])
            best = math.sqrt((values[:4] ** 2).sum() / (values**2).sum())
            assert module["captured"] == pytest.approx(best, abs=SHARES)


@pytest.mark.parametrize("error", [0.5, 0.2, 0.05])
def test_error_bounds_the_whole_difference(error: float) -> None:
    base = model()
    tuned = tuned_model(base)
    report, adapter = extract(base, tuned, "--mode", "error", "--error", error)
    assert report["relative_error"] <= error
    assert_report_is_true(report, base, tuned, adapter)
    # Not bought with all there is.
    assert sum(ranks(report).values()) < sum(len(singular_values(base, tuned, layer)) for layer in MATRICES)


@pytest.mark.parametrize("size", ["15kB", "17 KiB", "20000", "1MB"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_size_is_not_exceeded(size: str, dtype: str) -> None:
    base = model()
    tuned = tuned_model(base, [f"{layer}.weight" for layer in MATRICES])
    report, _ = extract(base, tuned, "--mode", "size", "--size", size, "--dtype", dtype)
    asked = {"15kB": 15_000, "17 KiB": 17_408, "20000": 20_000, "1MB": 1_000_000}[size]
    assert Path("out.safetensors").stat().st_size == report["nbytes"] <= asked


def test_a_larger_size_loses_less() -> None:
    base = model()
    tuned = tuned_model(base, [f"{layer}.weight" for layer in MATRICES])
    errors = [
        extract(base, tuned, "--mode", "size", "--size", size)[0]["relative_error"]
        for size in ("15kB", "18kB", "21kB", "1MB")
    ]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4


def test_size_counts_biases() -> None:
    layer = f"{UNET}out.2"
    base = {f"{layer}.weight": normal(4096, 2), f"{layer}.bias": normal(4096)}
    extract(base, tuned_model(base), "--mode", "size", "--size", "45kB")
    assert Path("out.safetensors").stat().st_size <= 45_000


def test_size_counts_the_sparse_part() -> None:
    base = {f"{LINEAR}.weight": normal(100, 100)}
    options = ("--mode", "size", "--size", "30kB", "--sparse-bias", "--sparsity", "0.8")
    extract(base, tuned_model(base), *options)
    assert Path("out.safetensors").stat().st_size <= 30_000


def test_size_is_not_spent_on_what_does_not_differ() -> None:
    """An unchanged token embedding is larger than most adapters."""
    base = model() | {f"{EMBEDDING}.weight": normal(5000, 24)}
    report, _ = extract(base, tuned_model(base, [f"{LINEAR}.weight"]), "--mode", "size", "--size", "50kB")
    assert report["nbytes"] <= 50_000


# --- conv cores, sparse parts, clamping ----------------------------------------------------


def test_conv_cp_leaves_linear_layers_and_1x1_convolutions_plain() -> None:
    base = model()
    report, adapter = extract(base, tuned_model(base), "--rank", "4", "--use-conv-cp")
    assert [key for key in adapter if "lora_mid" in key] == [f"{NAMES[CONV]}.lora_mid.weight"]
    assert ranks(report) == dict.fromkeys(MATRICES, 4)


def test_conv_cp_rank_is_at_most_the_channels() -> None:
    base = model()
    tuned = tuned_model(base, [f"{CONV}.weight"])
    report, adapter = extract(base, tuned, "--rank", "100", "--use-conv-cp")
    assert adapter[f"{NAMES[CONV]}.lora_mid.weight"].shape == (20, 20, 3, 3)
    assert_report_is_true(report, base, tuned, adapter)


@pytest.mark.parametrize("layer", [LINEAR, POINT, CONV], ids=NAMES.get)
def test_the_sparse_part_is_the_largest_of_what_the_factors_leave(layer: str) -> None:
    base = model()
    tuned = tuned_model(base, [f"{layer}.weight"])
    key, module = f"{layer}.weight", NAMES[layer]
    without, plain = extract(base, tuned, "--rank", "3")
    report, adapter = extract(base, tuned, "--rank", "3", "--sparse-bias", "--sparsity", "0.95")

    assert adapter[f"{module}.bias_indices"].dtype == adapter[f"{module}.bias_size"].dtype == torch.int16
    rows, columns = base[key].flatten(1).shape
    assert adapter[f"{module}.bias_size"].tolist() == [rows, columns]
    count = round(0.05 * rows * columns)
    assert adapter[f"{module}.bias_indices"].shape == (2, count)
    assert adapter[f"{module}.bias_values"].shape == (count,)

    delta = (tuned[key].double() - base[key].double()).flatten(1)
    residual = delta - changes(plain, base)[key].flatten(1)
    smallest = residual.abs().flatten().sort(descending=True).values[count - 1]
    stored = residual[tuple(adapter[f"{module}.bias_indices"].long())]
    assert stored.abs().min() >= smallest - 4 * EPS * delta.abs().max()
    # The values are differences of float32 numbers of the delta's size.
    assert (adapter[f"{module}.bias_values"] - stored).abs().max() <= 4 * EPS * delta.abs().max()

    assert report["relative_error"] < without["relative_error"]
    assert_report_is_true(report, base, tuned, adapter)
    errors = [square(bake(base, file)[key] - tuned[key]) for file in (plain, adapter)]
    assert errors[1] < errors[0]
    kept = 1 - square(stored) / square(residual)
    assert errors[1] / errors[0] == pytest.approx(kept, rel=1e-4)  # both rounded to float32 by bake


def test_sparse_indices_wrap_above_32767_columns() -> None:
    base = {f"{LINEAR}.weight": normal(2, 40_000)}
    change = torch.zeros(2, 40_000)
    change[0] = normal(40_000)  # rank 1 goes here
    places = [(1, 5), (1, 32_767), (1, 32_768), (1, 39_999)]
    for row, column in places:
        change[row, column] = 3.0
    tuned = {f"{LINEAR}.weight": base[f"{LINEAR}.weight"] + change}

    report, adapter = extract(base, tuned, "--rank", "1", "--sparse-bias", "--sparsity", "0.99995")

    indices = adapter[f"{NAMES[LINEAR]}.bias_indices"]
    assert indices.dtype == torch.int16
    assert indices[1].min() < 0
    assert {tuple(pair) for pair in (indices.long() % 65536).T.tolist()} == set(places)
    assert (adapter[f"{NAMES[LINEAR]}.bias_size"].long() % 65536).tolist() == [2, 40_000]
    assert_report_is_true_for_unet(report, base, tuned, adapter)
    assert_baking_gives_the_tuned_model(report, base, tuned, adapter)


def assert_report_is_true_for_unet(report: dict, base: Tensors, tuned: Tensors, adapter: Tensors) -> None:
    key = f"{LINEAR}.weight"
    delta = tuned[key].double() - base[key].double()
    left = delta - changes(adapter, base, {LINEAR: NAMES[LINEAR]})[key]
    assert report["captured"]["unet"] == pytest.approx(1 - square(left) / square(delta), abs=SHARES)


def test_clamping_cuts_both_factors_at_a_quantile_of_their_entries() -> None:
    base = model()
    tuned = tuned_model(base)
    report, plain = extract(base, tuned, "--rank", "4")
    clamped_report, clamped = extract(base, tuned, "--rank", "4", "--clamp-quantile", "0.9")
    assert clamped_report["relative_error"] > report["relative_error"]
    for layer in MATRICES:
        keys = [f"{NAMES[layer]}.lora_{side}.weight" for side in ("up", "down")]
        entries = torch.cat([plain[key].flatten() for key in keys]).abs()
        limit = entries.sort().values[math.ceil(0.9 * len(entries)) - 1]
        for key in keys:
            assert torch.equal(clamped[key], plain[key].clamp(-limit, limit))


def test_nothing_is_clamped_unless_asked() -> None:
    base = model()
    tuned = tuned_model(base)
    _, plain = extract(base, tuned, "--rank", "4")
    _, whole = extract(base, tuned, "--rank", "4", "--clamp-quantile", "1")
    assert all(torch.equal(plain[key], whole[key]) for key in plain)


# --- which layers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (("--include", "lora_te_*"), {EMBEDDING, TEXT_LINEAR, TEXT_NORM}),
        (("--include", f"{UNET}*"), {LINEAR, POINT, CONV, NORM}),
        (("--exclude", "*norm*"), {LINEAR, POINT, CONV, EMBEDDING, TEXT_LINEAR}),
        (("--include", "*attn1*", "--include", "*fc1"), {LINEAR, TEXT_LINEAR}),
        (("--include", "lora_unet_*", "--exclude", "*conv1", "--exclude", "*.proj_in"), {LINEAR, NORM}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_include_and_exclude(options: tuple[str, ...], layers: set[str]) -> None:
    base = model()
    report, adapter = extract(base, tuned_model(base), *options)
    assert {key.split(".")[0] for key in adapter} == {NAMES[layer] for layer in layers}
    left_out = report["skipped"]["left out by --include or --exclude"]
    assert set(left_out) == NAMES.keys() - layers


def test_min_diff_judges_each_layer_by_itself() -> None:
    """sd-scripts drops the whole text encoder when no layer of it exceeds the bound."""
    base = model()
    tuned = tuned_model(base, [f"{LINEAR}.weight"])
    tuned[f"{TEXT_LINEAR}.weight"] = base[f"{TEXT_LINEAR}.weight"].clone()
    tuned[f"{TEXT_LINEAR}.weight"][3, 5] += 1e-4

    _, adapter = extract(base, tuned)
    assert {key.split(".")[0] for key in adapter} == {NAMES[LINEAR], NAMES[TEXT_LINEAR]}

    tuned[f"{TEXT_NORM}.weight"] = base[f"{TEXT_NORM}.weight"] + 0.1
    report, adapter = extract(base, tuned, "--min-diff", "0.01")
    assert {key.split(".")[0] for key in adapter} == {NAMES[LINEAR], NAMES[TEXT_NORM]}
    assert any(TEXT_LINEAR in names for names in report["skipped"].values())


def test_min_diff_is_about_the_largest_element() -> None:
    base = {f"{LINEAR}.weight": torch.zeros(4, 4), f"{TEXT_LINEAR}.weight": torch.zeros(4, 4)}
    tuned = {key: tensor.clone() for key, tensor in base.items()}
    tuned[f"{LINEAR}.weight"][0, 0] = 0.25
    tuned[f"{TEXT_LINEAR}.weight"][:] = 0.125
    _, adapter = extract(base, tuned, "--min-diff", "0.125")  # no more than the bound is left out
    assert {key.split(".")[0] for key in adapter} == {NAMES[LINEAR]}


def test_a_difference_below_min_diff_is_not_called_unchanged() -> None:
    base = model()
    tuned = tuned_model(base, [f"{LINEAR}.weight"])
    tuned[f"{CONV}.weight"] = base[f"{CONV}.weight"] + 1e-3
    report, adapter = extract(base, tuned, "--min-diff", "0.01")
    (reason,) = (reason for reason, names in report["skipped"].items() if CONV in names)
    assert reason != "unchanged"
    assert NAMES[CONV] not in {key.split(".")[0] for key in adapter}


def test_everything_left_out_has_a_reason() -> None:
    base = model() | {f"{UNET}middle_block.extra": normal(3)}
    tuned = tuned_model(base, [f"{LINEAR}.weight", f"{VAE}decoder.conv_in.weight"])
    del tuned[f"{UNET}middle_block.extra"]
    report, _ = extract(base, tuned, "--exclude", "*conv1")
    skipped = {path: reason for reason, paths in report["skipped"].items() for path in paths}
    assert skipped.pop(f"{VAE}decoder.conv_in") == "part of the VAE"
    assert skipped.pop(f"{TEXT}embeddings.position_ids") == "not a floating-point weight"
    assert skipped.pop(f"{UNET}middle_block.extra") == "in one checkpoint only"
    assert skipped.pop(CONV) == "left out by --include or --exclude"
    assert skipped == dict.fromkeys(NAMES.keys() - {LINEAR, CONV}, "unchanged")


def test_a_text_encoder_that_only_one_file_has_is_reported() -> None:
    base = model()
    tuned = {key: t for key, t in tuned_model(base).items() if key.startswith(UNET)}
    report, adapter = extract(base, tuned, "--rank", "4")
    assert {key.split(".")[0] for key in adapter} == {NAMES[layer] for layer in (LINEAR, POINT, CONV, NORM)}
    assert {EMBEDDING, TEXT_LINEAR, TEXT_NORM} <= set(report["skipped"]["in one checkpoint only"])


def test_a_bias_that_only_one_file_has_is_reported() -> None:
    base = model()
    tuned = tuned_model(base)
    del tuned[f"{POINT}.bias"]
    report, _ = extract(base, tuned)
    assert any(POINT in path for path in report["skipped"].get("in one checkpoint only", ()))


def test_every_module_in_the_file_is_in_the_report() -> None:
    base = model()
    report, adapter = extract(base, tuned_model(base, [f"{POINT}.bias", f"{NORM}.bias", f"{LINEAR}.weight"]))
    assert {m["name"] for m in report["modules"]} == {key.split(".")[0] for key in adapter}


def test_a_number_beside_the_weights_does_not_spoil_the_file() -> None:
    """OpenCLIP's logit scale has no dimensions; no adapter format holds such a difference."""
    base = model() | {f"{TEXT}logit_scale": torch.tensor(4.6)}
    tuned = tuned_model(base, [f"{LINEAR}.weight"]) | {f"{TEXT}logit_scale": torch.tensor(4.5)}
    report, adapter = extract(base, tuned)
    bake(base, adapter)
    assert [path for paths in report["skipped"].values() for path in paths if path.endswith("logit_scale")]


def test_moving_averages_in_one_file_are_left_aside() -> None:
    """SD 1.x comes with and without them; they are no part of the model."""
    schedule = {"betas": normal(10)}
    base = model() | schedule | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks11proj_inweight": normal(24, 20, 1, 1),
    }  # fmt: skip
    tuned = tuned_model(model(), [f"{LINEAR}.weight"]) | schedule
    report, adapter = extract(base, tuned)
    assert {key.split(".")[0] for key in adapter} == {NAMES[LINEAR]}
    assert [path for paths in report["skipped"].values() for path in paths if path.startswith("model_ema")]


# --- dtypes --------------------------------------------------------------------------------

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize("option", DTYPES)
def test_dtype(option: str) -> None:
    base = model()
    _, adapter = extract(base, tuned_model(base), "--rank", "4", "--dtype", option)
    assert {t.dtype for key, t in adapter.items() if not key.endswith(".alpha")} == {DTYPES[option]}
    assert {float(t) for key, t in adapter.items() if key.endswith(".alpha")} == {4.0}


@pytest.mark.parametrize("option", ["fp16", "bf16"])
def test_rounding_the_factors_is_all_that_is_lost_at_full_rank(option: str) -> None:
    base = model()
    report, _ = extract(base, tuned_model(base), "--rank", "100", "--dtype", option)
    # eps/2 of each of two factors, and as much of the norms.
    assert EPS < report["relative_error"] <= 2 * torch.finfo(DTYPES[option]).eps


@pytest.mark.parametrize(
    ("one", "two"), [("fp16", "fp32"), ("fp32", "fp16"), ("bf16", "fp16"), ("bf16", "fp32")]
)
def test_dtypes_of_the_checkpoints_may_differ(one: str, two: str) -> None:
    """Each is widened before the subtraction; the tuned one's dtype is kept."""
    base = {k: t.to(DTYPES[one]) if t.is_floating_point() else t for k, t in model().items()}
    tuned = {k: t.to(DTYPES[two]) if t.is_floating_point() else t for k, t in tuned_model(model()).items()}
    _, kept = extract(base, tuned, "--algo", "full")
    assert {t.dtype for t in kept.values()} == {DTYPES[two]}
    _, adapter = extract(base, tuned, "--algo", "full", "--dtype", "fp32")
    for layer in MATRICES:
        key = f"{layer}.weight"
        assert torch.equal(adapter[f"{NAMES[layer]}.diff"], tuned[key].float() - base[key].float())


def test_double_precision_is_not_lost_before_the_subtraction() -> None:
    base = {f"{LINEAR}.weight": normal(24, 40).double()}
    change = 1e-12 * normal(24, 1).double() @ normal(1, 40).double()
    _, adapter = extract(base, {f"{LINEAR}.weight": base[f"{LINEAR}.weight"] + change}, "--rank", "1")
    found = changes(adapter, base, {LINEAR: NAMES[LINEAR]})[f"{LINEAR}.weight"]
    # The sum was rounded to eps/2 of about 1; 24·40 such errors make about 30 eps/2.
    assert math.sqrt(square(found - change)) <= 40 * torch.finfo(torch.float64).eps


# --- kinds of checkpoints ------------------------------------------------------------------


def sharded(tensors: Tensors, name: str) -> str:
    """A checkpoint in as many files as tensors."""
    shards = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        shards[key] = f"{name}-{number}.safetensors"
        write(Path(shards[key]), {key: tensor})
    Path(f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return f"{name}.safetensors.index.json"


def test_sharded_checkpoints() -> None:
    base = model()
    tuned = tuned_model(base)
    _, expected = extract(base, tuned, "--rank", "4")
    one, two = sharded(base, "a"), sharded(tuned, "b")
    assert succeed("extract", one, two, "--rank", "4").stdout == "b-extracted.safetensors\n"
    found = read(Path("b-extracted.safetensors"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_prefixes_of_the_denoiser_may_differ() -> None:
    """ComfyUI saves Flux and its like below ``model.diffusion_model.``, their makers do not."""
    base = {f"{UNET}double_blocks.0.img_attn.qkv.weight": normal(12, 8)}
    tuned = {key.removeprefix(UNET): tensor for key, tensor in tuned_model(base).items()}
    _, adapter = extract(base, tuned)
    assert {key.split(".")[0] for key in adapter} == {"lora_unet_double_blocks_0_img_attn_qkv"}


def folder(path: str, components: Mapping[str, Tensors]) -> str:
    """A diffusers folder of these state dicts."""
    for component, state in components.items():
        (Path(path) / component).mkdir(parents=True)
        name = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        write(Path(path) / component / f"{name}.safetensors", state)
    (Path(path) / "model_index.json").write_text("{}")
    return path


def test_an_sd1_file_against_a_diffusers_folder() -> None:
    """Renamed layers are paired, and give the adapter that two single files give."""
    unet, text = dict(arch.sd1_unet().state_dict()), dict(arch.sd1_text_encoder().state_dict())

    def single() -> Tensors:
        return with_prefix(UNET, unet_to_ldm(unet)) | with_prefix(arch.SD1_CLIP_PREFIX, clip_to_ldm(text))

    write(Path("base.safetensors"), single())
    changed = {
        "lora_unet_down_blocks_1_attentions_0_proj_in": (unet, "down_blocks.1.attentions.0.proj_in.weight"),
        "lora_unet_up_blocks_2_upsamplers_0_conv": (unet, "up_blocks.2.upsamplers.0.conv.bias"),
        "lora_unet_mid_block_resnets_1_conv2": (unet, "mid_block.resnets.1.conv2.weight"),
        "lora_unet_time_embedding_linear_2": (unet, "time_embedding.linear_2.weight"),
        "lora_unet_conv_norm_out": (unet, "conv_norm_out.weight"),
        "lora_te_text_model_encoder_layers_5_self_attn_v_proj": (
            text,
            "text_model.encoder.layers.5.self_attn.v_proj.weight",
        ),
        "lora_te_text_model_embeddings_token_embedding": (
            text,
            "text_model.embeddings.token_embedding.weight",
        ),
    }
    for state, key in changed.values():
        state[key] = state[key] + 0.1 * normal(*state[key].shape)
    folder("tuned", {"unet": unet, "text_encoder": text})
    write(Path("tuned.safetensors"), single())

    output = succeed("extract", "base.safetensors", "tuned", "--rank", "8").stdout.strip()
    assert output == "tuned-extracted.safetensors"
    found = read(Path(output))
    succeed("extract", "base.safetensors", "tuned.safetensors", "--rank", "8", "-o", "two.safetensors")
    expected = read(Path("two.safetensors"))

    assert {key.split(".")[0] for key in found} == changed.keys()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    with safe_open(output, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"

    other = succeed("extract", "tuned", "base.safetensors", "--rank", "8", "-o", "back.safetensors")
    assert other.stdout == "back.safetensors\n"
    assert read(Path("back.safetensors")).keys() == expected.keys()


@cache
def sdxl() -> Tensors:
    return arch.sdxl_single_file(torch.float32)


def test_sdxl_file() -> None:
    """The second text encoder keeps q, k and v in one tensor; modules have them apart."""
    base = sdxl()
    prefix = arch.SDXL_CLIP_PREFIXES[1]
    attention = f"{prefix}transformer.resblocks.3.attn.in_proj"
    width = arch.CLIP_G_WIDTH
    tuned = dict(base)
    tuned[f"{attention}_weight"] = base[f"{attention}_weight"].clone()
    tuned[f"{attention}_weight"][width : 2 * width] += 0.1 * normal(width, width)
    tuned[f"{attention}_bias"] = base[f"{attention}_bias"].clone()
    tuned[f"{attention}_bias"][2 * width :] += 0.25
    to_q = f"{UNET}input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight"
    tuned[to_q] = base[to_q] * 1.5
    tuned[f"{prefix}text_projection"] = base[f"{prefix}text_projection"] + 0.5

    report, adapter = extract(base, tuned, "--rank", "100")

    layer = "lora_te2_text_model_encoder_layers_3_self_attn"
    modules = {key.split(".")[0] for key in adapter}
    assert modules - {"lora_te2_text_projection"} == {
        f"{layer}_k_proj",
        f"{layer}_v_proj",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
    }
    assert {key for key in adapter if key.startswith(f"{layer}_v_proj")} == {f"{layer}_v_proj.diff_b"}
    baked = bake(base, adapter)
    for key in (f"{attention}_weight", f"{attention}_bias", to_q):
        # Factors and the sum round in float32, each by about eps of the weight.
        assert (baked[key] - tuned[key]).abs().max() <= 8 * EPS * tuned[key].abs().max()
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
        assert file.metadata()["ss_v2"] == "False"
    # OpenCLIP's text projection is stored transposed: extracted or reported, never just lost.
    said = [path for paths in report["skipped"].values() for path in paths]
    assert "lora_te2_text_projection" in modules or any(p.endswith("text_projection") for p in said)


def test_an_sdxl_file_against_a_diffusers_folder() -> None:
    """OpenCLIP's names, fused attention and transposed projection against transformers'."""
    first, second = (dict(encoder.state_dict()) for encoder in arch.sdxl_text_encoders())
    q = "text_model.encoder.layers.7.self_attn.q_proj.weight"
    second[q] = second[q] + 0.1 * normal(*second[q].shape)
    write(Path("base.safetensors"), sdxl())
    folder("tuned", {"text_encoder": first, "text_encoder_2": second})

    succeed("extract", "base.safetensors", "tuned", "-o", "out.safetensors")

    modules = {key.split(".")[0] for key in read(Path("out.safetensors"))}
    assert modules == {"lora_te2_text_model_encoder_layers_7_self_attn_q_proj"}


def test_an_sd2_file_against_a_diffusers_folder() -> None:
    """The file has a last text-encoder layer that the folder leaves out, as nothing uses it."""
    base = arch.sd2_single_file(torch.float32)
    unet, text = dict(arch.sd2_unet().state_dict()), dict(arch.sd2_text_encoder().state_dict())
    key = "mid_block.attentions.0.proj_in.weight"
    unet[key] = unet[key] + 0.1 * normal(*unet[key].shape)
    write(Path("base.safetensors"), base)
    folder("tuned", {"unet": unet, "text_encoder": text})

    succeed("extract", "base.safetensors", "tuned", "-o", "out.safetensors")

    modules = {key.split(".")[0] for key in read(Path("out.safetensors"))}
    assert modules == {"lora_unet_mid_block_attentions_0_proj_in"}
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v2"
        assert file.metadata()["ss_v2"] == "True"


# --- the file and the report ---------------------------------------------------------------


def metadata_of(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (("--rank", "4"), {"algo": "locon"}),
        (("--rank", "4", "--use-conv-cp"), {"algo": "locon", "use_tucker": "True"}),
        (("--algo", "dora", "--rank", "4"), {"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}),
        (
            ("--algo", "dora", "--rank", "4", "--dora-axis", "in"),
            {"dora_wd": "True", "wd_on_output": "False"},
        ),
        (("--algo", "lokr"), {"algo": "lokr"}),
        (("--algo", "full"), {"algo": "full"}),
        (("--mode", "full"), {"algo": "full"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_metadata(options: tuple[str, ...], arguments: dict[str, str]) -> None:
    base = model()
    extract(base, tuned_model(base), *options)
    metadata = metadata_of("out.safetensors")
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert arguments.items() <= json.loads(metadata["ss_network_args"]).items()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_v2"] == "False"
    if "--rank" in options:
        assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "4"
    recipe = json.loads(metadata["lycotool.extract"])
    assert (recipe["base"], recipe["tuned"]) == ("base.safetensors", "tuned.safetensors")
    assert "tuned.safetensors" in metadata["ss_training_comment"]


def test_hashes_are_those_of_the_file() -> None:
    base = model()
    extract(base, tuned_model(base), "--rank", "4")
    content = Path("out.safetensors").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    metadata = metadata_of("out.safetensors")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    # The old hash is over 64 KiB at 1 MiB; this file is shorter.
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]


@pytest.mark.parametrize(
    "options", [("--rank", "4"), ("--algo", "dora"), ("--algo", "lokr"), ("--sparse-bias",)]
)
def test_the_same_bytes_twice(options: tuple[str, ...]) -> None:
    base = model() | {f"{LINEAR}.weight": normal(220, 260)}  # large enough for a random start
    tuned = tuned_model(base)
    contents = []
    for _ in range(2):
        extract(base, tuned, *options)
        contents.append(Path("out.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_default_name_and_standard_output_of_the_command() -> None:
    base = model()
    Path("below").mkdir()
    write(Path("base.safetensors"), base)
    write(Path("below/my.tuned.safetensors"), tuned_model(base))
    result = succeed("extract", "base.safetensors", "below/my.tuned.safetensors", "--modules")
    assert result.stdout == "my.tuned-extracted.safetensors\n"
    assert Path("my.tuned-extracted.safetensors").exists()
    assert all(name in result.stderr for name in NAMES.values())
    (shares,) = re.findall("captured energy: (.*);", result.stderr)
    assert {share.split()[0] for share in shares.split(", ")} == {"unet", "te1", "all"}
    assert "part of the VAE" in result.stderr


def test_quiet() -> None:
    base = model()
    write(Path("base.safetensors"), base)
    write(Path("tuned.safetensors"), tuned_model(base))
    assert succeed("extract", "base.safetensors", "tuned.safetensors", "-q").stderr == ""


def test_json() -> None:
    base = model()
    report, _ = extract(base, tuned_model(base), "--rank", "4")
    assert report["schema_version"] == 1
    assert report["output"] == "out.safetensors"
    assert report["dry_run"] is False
    assert report["warnings"] == []
    assert report["captured"].keys() == {"unet", "te1", "all"}
    linear = next(m for m in report["modules"] if m["layer"] == LINEAR)
    assert linear.keys() == {"name", "layer", "type", "rank", "norm", "captured"}
    assert (linear["name"], linear["type"], linear["rank"]) == (NAMES[LINEAR], "lora", 4)
    norm = next(m for m in report["modules"] if m["layer"] == NORM)
    assert (norm["type"], norm["rank"]) == ("norm", None)


def test_dry_run_reports_the_same_and_writes_nothing() -> None:
    base = model()
    tuned = tuned_model(base)
    report, _ = extract(base, tuned, "--rank", "4")
    Path("out.safetensors").unlink()
    files = set(Path().iterdir())
    arguments = (
        "extract",
        "base.safetensors",
        "tuned.safetensors",
        "-o",
        "out.safetensors",
        "--rank",
        "4",
        "-n",
    )
    planned = json.loads(succeed(*arguments, "--json").stdout)
    assert planned == report | {"dry_run": True}
    assert succeed(*arguments).stdout == ""
    assert set(Path().iterdir()) == files


def test_standard_output_gets_the_file_and_nothing_else() -> None:
    base = model()
    tuned = tuned_model(base)
    extract(base, tuned, "--rank", "4")
    result = succeed("extract", "base.safetensors", "tuned.safetensors", "--rank", "4", "-o", "-")
    assert result.stdout_bytes == Path("out.safetensors").read_bytes()


# --- bad input -----------------------------------------------------------------------------


def test_identical_checkpoints() -> None:
    code, text = refuse(model(), model())
    assert code == 5
    assert "do not differ" in text
    assert "name the base first" in text


def test_the_same_file_twice() -> None:
    write(Path("base.safetensors"), model())
    result = run("extract", "base.safetensors", "base.safetensors")
    assert result.exit_code == 5
    assert "do not differ" in result.stderr


def test_checkpoints_that_differ_in_the_vae_alone() -> None:
    base = model()
    code, text = refuse(base, tuned_model(base, [f"{VAE}decoder.conv_in.weight"]))
    assert code == 5
    assert "VAE" in text


def test_another_architecture_names_the_first_differing_layers() -> None:
    base = model()
    tuned = {key.replace("input_blocks.1.1", "input_blocks.2.1"): tensor for key, tensor in base.items()}
    code, text = refuse(base, tuned)
    assert code == 5
    assert "not the same model" in text
    assert f"{LINEAR}: not in tuned.safetensors" in text
    assert f"{LINEAR.replace('1.1', '2.1')}: not in base.safetensors" in text


def test_sd1_against_sd2() -> None:
    code, text = refuse(arch.sd1_single_file(), arch.sd2_single_file())
    assert code == 5
    assert "not the same model" in text
    assert len(text.splitlines()) <= 30  # the first ones, not a thousand


def test_checkpoints_with_nothing_in_common_name_layers() -> None:
    base = model()
    code, text = refuse(
        {key: t for key, t in base.items() if key.startswith(UNET)},
        {key: t for key, t in base.items() if key.startswith(TEXT)},
    )
    assert code == 5
    assert LINEAR in text or EMBEDDING in text


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{LINEAR}.weight", (24, 41)),
        (f"{LINEAR}.weight", (40, 24)),  # as many elements, but another matrix
        (f"{CONV}.weight", (24, 20, 1, 1)),
        (f"{NORM}.weight", (21,)),
        (f"{POINT}.bias", (25,)),
        (f"{EMBEDDING}.weight", (51, 24)),
    ],
    ids=str,
)
def test_shapes_that_differ(key: str, shape: tuple[int, ...]) -> None:
    base = model()
    code, text = refuse(base, tuned_model(base) | {key: normal(*shape)})
    assert code == 5
    assert key.rsplit(".", 1)[0] in text
    assert str(list(shape)) in text


def test_a_1x1_convolution_and_a_linear_layer_are_the_same_matrix() -> None:
    base = model()
    tuned = tuned_model(base)
    tuned[f"{POINT}.weight"] = tuned[f"{POINT}.weight"].flatten(1)
    report, _ = extract(base, tuned, "--rank", "100")
    assert ranks(report)[POINT] == 20


@pytest.mark.parametrize(
    ("value", "side", "key"),
    [
        (math.nan, "base", f"{LINEAR}.weight"),
        (math.inf, "base", f"{NORM}.bias"),
        (math.nan, "tuned", f"{EMBEDDING}.weight"),
        (-math.inf, "tuned", f"{CONV}.weight"),
        (math.nan, "tuned", f"{POINT}.bias"),
    ],
)
def test_values_that_are_not_finite(value: float, side: str, key: str) -> None:
    base = model()
    files = {"base": base, "tuned": tuned_model(base)}
    files[side][key] = files[side][key].clone()
    files[side][key].flatten()[1] = value
    code, text = refuse(files["base"], files["tuned"])
    assert code == 6
    assert f"{side}.safetensors: {key}" in text


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_adapter_is_no_checkpoint(side: str) -> None:
    files = {"base": checkpoint(), "tuned": checkpoint(), side: lora()}
    code, text = refuse(files["base"], files["tuned"])
    assert code == 5
    assert f"{side}.safetensors: this is an adapter" in text


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "0"),
        ("--rank", "-1"),
        ("--conv-rank", "0"),
        ("--mode", "nonsense"),
        ("--algo", "nonsense"),
        ("--dtype", "nonsense"),
        ("--dora-axis", "sideways"),
        ("--mode", "threshold"),
        ("--mode", "threshold", "--param", "-1"),
        ("--mode", "threshold", "--param", "nan"),
        ("--mode", "ratio", "--param", "1.5"),
        ("--mode", "ratio", "--param", "0"),
        ("--mode", "quantile", "--param", "-0.1"),
        ("--mode", "quantile", "--param", "1.1"),
        ("--mode", "fro"),
        ("--mode", "fro", "--param", "2"),
        ("--mode", "fro", "--param", "0.5", "--conv-param", "2"),
        ("--mode", "size"),
        ("--mode", "size", "--size", "much"),
        ("--mode", "size", "--size", "0"),
        ("--mode", "error"),
        ("--mode", "error", "--error", "1"),
        ("--mode", "error", "--error", "-0.1"),
        ("--mode", "error", "--error", "nan"),
        ("--size", "1MB"),
        ("--error", "0.1"),
        ("--mode", "size", "--size", "1MB", "--error", "0.1"),
        ("--mode", "fixed", "--param", "0.5"),
        ("--use-conv-cp", "--mode", "fro", "--param", "0.9"),
        ("--use-conv-cp", "--algo", "lokr"),
        ("--sparse-bias", "--use-conv-cp"),
        ("--sparse-bias", "--algo", "dora"),
        ("--sparse-bias", "--mode", "full"),
        ("--sparse-bias", "--sparsity", "1"),
        ("--sparse-bias", "--sparsity", "0"),
        ("--sparse-bias", "--sparsity", "nan"),
        ("--algo", "full", "--mode", "fro", "--param", "0.9"),
        ("--algo", "ia3", "--mode", "size", "--size", "1MB"),
        ("--algo", "lokr", "--mode", "fro", "--param", "0.9"),
        ("--algo", "dora", "--mode", "full"),
        ("--algo", "lokr", "--factor", "0"),
        ("--clamp-quantile", "0"),
        ("--clamp-quantile", "1.5"),
        ("--clamp-quantile", "nan"),
        ("--min-diff", "-1"),
        ("--min-diff", "nan"),
        ("-o", "out.ckpt"),
    ],
    ids=" ".join,
)
def test_usage(options: tuple[str, ...]) -> None:
    base = model()
    code, text = refuse(base, tuned_model(base), *options)
    assert code == 2, text
    assert text


def test_a_missing_input() -> None:
    write(Path("base.safetensors"), model())
    assert run("extract", "base.safetensors", "absent.safetensors").exit_code == 2


def test_ia3_of_an_arbitrary_difference_says_how_far_off_it_is() -> None:
    base = model()
    tuned = tuned_model(base, [f"{LINEAR}.weight"])
    tuned[f"{CONV}.weight"] = base[f"{CONV}.weight"] * 1.25

    code, text = refuse(base, tuned, "--algo", "ia3")

    assert code == 5
    assert NAMES[CONV] not in text  # that one is a scaling
    weight, delta = base[f"{LINEAR}.weight"].double(), tuned[f"{LINEAR}.weight"].double()
    delta = delta - weight
    shares = []
    for axis in (0, 1):
        vector = (delta * weight).sum(1 - axis, keepdim=True) / weight.square().sum(1 - axis, keepdim=True)
        shares.append(math.sqrt(square(delta - vector * weight) / square(delta)))
    assert f"{NAMES[LINEAR]}: {min(shares):.1%}" in text


def test_a_size_too_small_for_rank_one_says_what_is_needed() -> None:
    base = model()
    code, text = refuse(base, tuned_model(base), "--mode", "size", "--size", "100")
    assert code == 5
    assert re.search(r"100 bytes are too few: .* needs \d+", text)


@pytest.mark.parametrize("algo", ["lora", "full"])
def test_values_beyond_the_saved_dtype(algo: str) -> None:
    base = {f"{LINEAR}.weight": normal(4, 4)}
    tuned = {f"{LINEAR}.weight": base[f"{LINEAR}.weight"] + 1e5}
    code, text = refuse(base, tuned, "--algo", algo, "--dtype", "fp16")
    assert code == 6
    assert NAMES[LINEAR] in text
    assert "65504" in text


def test_an_existing_output_is_kept() -> None:
    base = model()
    write(Path("base.safetensors"), base)
    write(Path("tuned.safetensors"), tuned_model(base))
    Path("out.safetensors").write_bytes(b"mine")
    result = run("extract", "base.safetensors", "tuned.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 7
    assert Path("out.safetensors").read_bytes() == b"mine"
    succeed("extract", "base.safetensors", "tuned.safetensors", "-o", "out.safetensors", "--force")


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_input_is_never_overwritten(side: str) -> None:
    base = model()
    write(Path("base.safetensors"), base)
    write(Path("tuned.safetensors"), tuned_model(base))
    result = run("extract", "base.safetensors", "tuned.safetensors", "-o", f"{side}.safetensors", "--force")
    assert result.exit_code == 7
    assert read(Path("base.safetensors")).keys() == base.keys()


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_scaled_float8_is_read_as_what_it_means(side: str) -> None:
    """The weights mean something only times their scales, which are tensors beside them."""
    stored = (100 * normal(24, 40, seed=1)).to(torch.float8_e4m3fn)
    scale = 0.01 + normal(24, 1, seed=2).abs()
    scaled = {f"{LINEAR}.weight": stored, f"{LINEAR}.weight_scale": scale}
    meant = {f"{LINEAR}.weight": stored.float() * scale}
    plain = {f"{LINEAR}.weight": normal(24, 40)}
    for name, one in (("scaled", scaled), ("meant", meant)):
        files = {"base": plain, "tuned": plain, side: one}
        write(Path("base.safetensors"), files["base"])
        write(Path("tuned.safetensors"), files["tuned"])
        succeed(
            "extract", "base.safetensors", "tuned.safetensors", "--rank", 4, "-o", f"{name}.safetensors",
        )  # fmt: skip
    one, two = read(Path("scaled.safetensors")), read(Path("meant.safetensors"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_packed_weights_are_refused() -> None:
    packed = {
        f"{LINEAR}.weight": torch.zeros(24, 40, dtype=torch.int8),
        f"{LINEAR}.SCB": torch.ones(24),
    }
    code, text = refuse({f"{LINEAR}.weight": normal(24, 40)}, packed)
    assert code == 5
    assert "bitsandbytes" in text


def test_a_failed_run_leaves_nothing_behind() -> None:
    base = model()
    refuse(base, tuned_model(base) | {f"{LINEAR}.weight": torch.full((24, 40), math.nan)})
    assert {path.name for path in Path().iterdir()} == {"base.safetensors", "tuned.safetensors"}
