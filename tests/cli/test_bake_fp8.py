"""Checkpoints in float8, plain and scaled: what every scheme means, written out again here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import read, run, succeed, write
from safetensors import safe_open
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIMITS = {E4M3: 448.0, E5M2: 57344.0}
PREFIX = "model.diffusion_model."

#: Layer to shape; the second has rows and columns that 128 does not divide.
SHAPES = {"blocks.0.q": (256, 128), "blocks.1.k": (200, 192)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Scheme:
    """How a program stores a weight.

    Parameters
    ----------
    name
        Of the scale, beside ``weight``.
    scales
        Gives the scales' shape for a weight's.
    expand
        The scales as that program multiplies the weight by them, in the weight's shape.
    beside
        What else it stores.
    """

    name: str
    scales: Callable[[tuple[int, int]], tuple[int, ...]]
    expand: Callable[[Tensor, tuple[int, int]], Tensor]
    beside: dict[str, Tensor]


def whole(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """ComfyUI: ``weight.to(dtype) * scale``."""
    return scale.expand(shape)


def blocks_of_rows(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """musubi-tuner: ``weight.reshape(out, blocks, size) * scale`` with scales (out, blocks, 1)."""
    return scale.expand(-1, -1, shape[1] // scale.shape[1]).reshape(shape)


def squares(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """transformers: blocks of 128 by 128, the last ones cut off."""
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


INPUT = torch.tensor(0.7)
SCHEMES = {
    "comfy": Scheme("scale_weight", lambda s: (), whole, {"scale_input": INPUT}),
    "comfy, one element": Scheme("scale_weight", lambda s: (1,), whole, {}),
    "comfy quant": Scheme(
        "weight_scale",
        lambda s: (),
        whole,
        {
            "input_scale": INPUT,
            "comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
        },
    ),
    "rows": Scheme("weight_scale", lambda s: (s[0], 1), whole, {}),
    "musubi blocks": Scheme("scale_weight", lambda s: (s[0], s[1] // 64, 1), blocks_of_rows, {}),
    "transformers": Scheme(
        "weight_scale_inv", lambda s: (-(-s[0] // 128), -(-s[1] // 128)), squares, {"input_scale": INPUT}
    ),
}


def scaled(scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint of two scaled layers, and tensors that are not scaled."""
    tensors: dict[str, Tensor] = {PREFIX + "scaled_fp8": torch.zeros(2, dtype=dtype)}
    for seed, (layer, shape) in enumerate(SHAPES.items()):
        scale = (0.5 + normal(*scheme.scales(shape), seed=10 + seed).abs()) * 0.01
        key = PREFIX + layer
        tensors[f"{key}.weight"] = (normal(*shape, seed=seed) * 0.2 * LIMITS[dtype]).to(dtype)
        tensors[f"{key}.{scheme.name}"] = scale.to(scale_dtype)
        tensors |= {f"{key}.{name}": tensor.clone() for name, tensor in scheme.beside.items()}
        tensors[f"{key}.bias"] = normal(shape[0], seed=20 + seed).half()
    tensors[PREFIX + "norm.weight"] = normal(7, seed=30).half()
    return tensors


def meaning(scheme: Scheme, tensors: dict[str, Tensor], layer: str) -> Tensor:
    """``W`` in float64."""
    key = PREFIX + layer
    scale = tensors[f"{key}.{scheme.name}"].double()
    return tensors[f"{key}.weight"].double() * scheme.expand(scale, SHAPES[layer])


def adapter(*layers: str, size: float = 0.3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA for some layers, and its change of each in float64."""
    tensors, changes = {}, {}
    for seed, layer in enumerate(layers):
        rows, columns = SHAPES[layer]
        up, down = size * normal(rows, 4, seed=40 + seed), normal(4, columns, seed=50 + seed)
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
        changes[layer] = 0.5 * up.double() @ down.double()
    return tensors, changes


def half_spacing(exact: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of neighbours in float8 times a scale: relative, or fixed near zero.

    A part in 2¹⁵ more for the products, the scale and the quotient in float32.
    """
    info = torch.finfo(dtype)
    return torch.maximum(exact.abs() * info.eps / 2, step * info.smallest_normal * info.eps / 2) + (
        exact.abs().max() * 2.0**-20
    )


def same_bytes(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_changed_in_float32_and_requantised_once(
    name: str, dtype: torch.dtype, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    scheme, layer, other = SCHEMES[name], *SHAPES
    before = scaled(scheme, dtype, scale_dtype)
    tensors, changes = adapter(layer)
    base = write(tmp_path / "base.safetensors", before, {"note": "mine"})
    source = write(tmp_path / "lora.safetensors", tensors)

    result = succeed("bake", base, source, "-o", tmp_path / "out.safetensors", "--verify", "--json")

    after = read(tmp_path / "out.safetensors")
    assert {key: (t.dtype, t.shape) for key, t in after.items()} == {
        key: (t.dtype, t.shape) for key, t in before.items()
    }
    exact = meaning(scheme, before, layer) + changes[layer]
    found = meaning(scheme, after, layer)
    scale = after[f"{PREFIX}{layer}.{scheme.name}"]
    error = (found - exact).abs()
    # A bfloat16 scale may be too small by a part in 2⁹: what then saturates was within that of the limit.
    slack = exact.abs().max() * (2.0**-9 if scale_dtype == torch.bfloat16 else 0)
    assert (error <= half_spacing(exact, scheme.expand(scale.double(), SHAPES[layer]), dtype) + slack).all()

    # New scales fill the range: the largest value of the layer is stored as the largest there is.
    assert float(after[f"{PREFIX}{layer}.weight"].float().abs().max()) == LIMITS[dtype]
    changed = {f"{PREFIX}{layer}.weight", f"{PREFIX}{layer}.{scheme.name}"}
    assert all(same_bytes(after[key], before[key]) for key in before.keys() - changed)
    assert f"{PREFIX}{other}.weight" not in changed

    report = json.loads(result.stdout)
    assert report["rounding"]["max_error"] == pytest.approx(float(error.max()), rel=1e-3)
    assert report["rounding"]["mean_error"] == pytest.approx(float(error.mean()), rel=1e-3)
    assert report["rounding"]["saturated"] == 0
    assert report["verified"]["max_error"] == pytest.approx(float(error.max()), rel=1e-6)
    assert report["verified"]["changed"] == 1


@pytest.mark.parametrize("option", ["fp32", "fp16", "bf16", "fp8_e5m2"])
@pytest.mark.parametrize("name", SCHEMES)
def test_another_dtype_drops_the_scales(name: str, option: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    before = scaled(scheme, E4M3, torch.float32)
    layer, _ = SHAPES
    tensors, changes = adapter(layer)
    base = write(tmp_path / "base.safetensors", before, {"_quantization_metadata": "{}", "note": "mine"})
    source = write(tmp_path / "lora.safetensors", tensors)

    succeed("bake", base, source, "--dtype", option, "--verify", "-o", tmp_path / "out.safetensors")

    after = read(tmp_path / "out.safetensors")
    assert sorted(after) == sorted(
        key for key in before if key.endswith(("weight", "bias")) and "scale" not in key
    )
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e5m2": E5M2}[option]
    assert {tensor.dtype for tensor in after.values()} == {wanted}
    for one in SHAPES:
        exact = meaning(scheme, before, one) + changes.get(one, 0)
        error = (after[f"{PREFIX}{one}.weight"].double() - exact).abs()
        assert (error <= half_spacing(exact, torch.ones(()).double(), wanted)).all()
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "_quantization_metadata" not in file.metadata()
        assert file.metadata()["note"] == "mine"


def test_merge_does_the_same(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", scaled(SCHEMES["comfy"], E4M3, torch.float32))
    source = write(tmp_path / "lora.safetensors", adapter(*SHAPES)[0])
    succeed("bake", base, source, "-o", tmp_path / "one.safetensors")
    succeed("merge", base, source, "-o", tmp_path / "two.safetensors")
    one, two = read(tmp_path / "one.safetensors"), read(tmp_path / "two.safetensors")
    assert all(same_bytes(one[key], two[key]) for key in one)


def test_unbaked_within_the_stated_error(tmp_path: Path) -> None:
    scheme = SCHEMES["rows"]
    start = scaled(scheme, E4M3, torch.float32)
    base = write(tmp_path / "base.safetensors", start)
    source = write(tmp_path / "lora.safetensors", adapter(*SHAPES)[0])
    succeed("bake", base, source, "-o", tmp_path / "baked.safetensors")

    result = succeed(
        "bake",
        tmp_path / "baked.safetensors",
        source,
        "--unbake",
        "--json",
        "-o",
        tmp_path / "out.safetensors",
    )

    error = json.loads(result.stdout)["reconstruction_error"]
    after = read(tmp_path / "out.safetensors")
    worst = max(
        float((meaning(scheme, after, layer) - meaning(scheme, start, layer)).abs().max()) for layer in SHAPES
    )
    assert 0 < worst <= error


def test_strength_zero_copies_everything(tmp_path: Path) -> None:
    before = scaled(SCHEMES["musubi blocks"], E4M3, torch.float32)
    base = write(tmp_path / "base.safetensors", before)
    source = write(tmp_path / "lora.safetensors", adapter(*SHAPES)[0])
    succeed("bake", base, f"{source}:0", "-o", tmp_path / "out.safetensors")
    after = read(tmp_path / "out.safetensors")
    assert all(same_bytes(after[key], before[key]) for key in before)


def test_a_scale_in_another_shard_than_its_weight(tmp_path: Path) -> None:
    """A shard ends where it is full, and the input's shards are kept."""
    before = scaled(SCHEMES["comfy"], E4M3, torch.float32)
    shards = {key: f"m-{1 + key.endswith('.weight')}.safetensors" for key in before}
    for name in set(shards.values()):
        write(tmp_path / name, {key: before[key] for key in before if shards[key] == name})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    whole_file = write(tmp_path / "whole.safetensors", before)
    source = write(tmp_path / "lora.safetensors", adapter(*SHAPES)[0])

    succeed("bake", index, source, "--verify", "-o", tmp_path / "out.safetensors.index.json")
    succeed("bake", whole_file, source, "-o", tmp_path / "one.safetensors")

    expected = read(tmp_path / "one.safetensors")
    found = read(tmp_path / "out-00001-of-00002.safetensors") | read(
        tmp_path / "out-00002-of-00002.safetensors"
    )
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[key], expected[key]) for key in found)


def test_shards_keep_scales_with_their_weights(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", scaled(SCHEMES["comfy quant"], E4M3, torch.float32))
    succeed("bake", base, "--shard-size", "20KB", "-o", tmp_path / "out.safetensors")
    index = json.loads((tmp_path / "out.safetensors.index.json").read_text())["weight_map"]
    for layer in SHAPES:
        names = {index[f"{PREFIX}{layer}.{slot}"] for slot in ("weight", "weight_scale", "input_scale")}
        assert len(names) == 1


def test_plain_float8_reports_its_rounding(tmp_path: Path) -> None:
    layer, other = SHAPES
    before = {f"{PREFIX}{one}.weight": normal(*SHAPES[one], seed=1).to(E4M3) for one in SHAPES}
    tensors, changes = adapter(layer)
    base, source = write(tmp_path / "b.safetensors", before), write(tmp_path / "l.safetensors", tensors)

    result = succeed("bake", base, source, "-o", tmp_path / "out.safetensors", "--json", "--verify")

    after = read(tmp_path / "out.safetensors")
    error = (
        after[f"{PREFIX}{layer}.weight"].double()
        - (before[f"{PREFIX}{layer}.weight"].double() + changes[layer])
    ).abs()
    rounding = json.loads(result.stdout)["rounding"]
    assert rounding["max_error"] == pytest.approx(float(error.max()), rel=1e-3)
    assert rounding["mean_error"] == pytest.approx(float(error.mean()), rel=1e-3)
    assert same_bytes(after[f"{PREFIX}{other}.weight"], before[f"{PREFIX}{other}.weight"])


def test_plain_float8_does_not_saturate_silently(tmp_path: Path) -> None:
    layer, _ = SHAPES
    base = write(
        tmp_path / "b.safetensors", {f"{PREFIX}{layer}.weight": normal(*SHAPES[layer], seed=1).to(E4M3)}
    )
    source = write(tmp_path / "l.safetensors", adapter(layer, size=1e3)[0])
    result = run("bake", base, source, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 6
    assert "holds up to 448" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_merged_adapters_take_it_as_their_base(tmp_path: Path) -> None:
    """A DoRA becomes a plain difference from the weight, which is float8 times its scales."""
    layer, _ = SHAPES
    before = scaled(SCHEMES["transformers"], E4M3, torch.float32)
    meant = {f"{PREFIX}{one}.weight": meaning(SCHEMES["transformers"], before, one).float() for one in SHAPES}
    base, plain = write(tmp_path / "b.safetensors", before), write(tmp_path / "p.safetensors", meant)
    tensors, _ = adapter(layer)
    module = "lora_unet_" + layer.replace(".", "_")
    tensors[f"{module}.dora_scale"] = 1 + normal(SHAPES[layer][0], 1, seed=3).abs()
    dora = write(tmp_path / "d.safetensors", tensors)
    other = write(tmp_path / "l.safetensors", adapter(layer)[0])
    found = []
    for name in (base, plain):
        output = tmp_path / f"out-{name.name}"
        succeed("merge", dora, other, "--rebuild", "--base", name, "-o", output)
        found.append(read(output))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


KEY = f"{PREFIX}blocks.0.q"
REFUSED = {
    "bitsandbytes 4-bit": {f"{KEY}.weight": torch.zeros(64, 1, dtype=torch.uint8), f"{KEY}.weight.absmax": torch.ones(4)},
    "bitsandbytes 8-bit": {f"{KEY}.weight": torch.zeros(256, 128, dtype=torch.int8), f"{KEY}.SCB": torch.ones(256)},
    "scaled integer": {
        f"{KEY}.weight": torch.zeros(256, 128, dtype=torch.int8),
        f"{KEY}.weight_scale": torch.ones(256, 1),
    },
    "NVFP4": {
        f"{KEY}.weight": torch.zeros(256, 64, dtype=torch.uint8),
        f"{KEY}.weight_scale": torch.zeros(256, 8, dtype=E4M3),
        f"{KEY}.weight_scale_2": torch.tensor(1.0),
    },
    "F8_E8M0": {
        f"{KEY}.weight": torch.zeros(256, 128, dtype=E4M3),
        f"{KEY}.weight_scale": torch.zeros(256, 4, dtype=torch.float8_e8m0fnu),
    },
    "do not fit": {f"{KEY}.weight": torch.zeros(256, 128, dtype=E4M3), f"{KEY}.scale_weight": torch.ones(3, 5)},
}  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")], ids=["keep", "bf16"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused(kind: str, options: tuple[str, ...], tmp_path: Path) -> None:
    base = write(tmp_path / "b.safetensors", REFUSED[kind] | {f"{PREFIX}other.weight": torch.rand(256, 128)})
    layer = next(iter(SHAPES))
    tensors, _ = adapter(layer)
    if kind in ("bitsandbytes 4-bit", "NVFP4") or options:  # the packed shape fits no adapter
        tensors = {key.replace("blocks_0_q", "other"): tensor for key, tensor in tensors.items()}
        options = ("--dtype", "bf16")
    source = write(tmp_path / "l.safetensors", tensors)
    result = run("bake", base, source, *options, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 5
    assert kind in result.stderr
    assert f"{KEY}.weight" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()
