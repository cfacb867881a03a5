"""`merge`, `resize` and `extract` give on a GPU what they give on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, read, succeed, write
from torch import Tensor

pytestmark = pytest.mark.gpu

EPS = torch.finfo(torch.float32).eps
UNET = "model.diffusion_model."
SHAPES = {
    f"{UNET}input_blocks.1.0.in_layers.0": (64,),
    f"{UNET}input_blocks.1.0.in_layers.2": (64, 64, 3, 3),
    f"{UNET}input_blocks.1.1.proj_in": (64, 64, 1, 1),
    **{f"{UNET}input_blocks.{n}.1.transformer_blocks.0.attn1.to_q": (320, 640) for n in (1, 2, 4)},
    f"{UNET}input_blocks.5.1.transformer_blocks.0.attn1.to_q": (640, 320),
}


def on_both(tmp_path: Path, *arguments: object) -> tuple[Path, Path, list[dict]]:
    """Run a command on either device; the two outputs and reports."""
    outputs, reports = [], []
    for device in ("cpu", "cuda"):
        outputs.append(tmp_path / f"{device}.safetensors")
        result = succeed(*arguments, "--device", device, "--dtype", "fp32", "--json", "-o", outputs[-1])
        reports.append(json.loads(result.stdout))
    return outputs[0], outputs[1], reports


def changes(tmp_path: Path, base: Path, adapter: Path) -> dict[str, Tensor]:
    """What an adapter adds to a base, by key."""
    output = tmp_path / f"{adapter.stem}-baked.safetensors"
    succeed("bake", base, adapter, "--device", "cpu", "--dtype", "fp32", "-o", output)
    before, after = read(base), read(output)
    return {key: after[key].double() - before[key].double() for key in before}


def assert_same_changes(tmp_path: Path, base: Path, files: tuple[Path, Path], share: float) -> None:
    """Two adapters change a base alike, but for a share of the change and the sum's rounding."""
    one, two = (changes(tmp_path, base, file) for file in files)
    weights = read(base)
    for key in one:
        rounding = 2 * EPS * float(weights[key].double().norm())
        assert (one[key] - two[key]).norm() <= share * one[key].norm() + rounding, key


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and the same after a change of rank 4 with faint noise on it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {f"{name}.weight": normal(*shape) * 0.1 for name, shape in SHAPES.items()}
    base[f"{UNET}input_blocks.1.0.in_layers.0.bias"] = normal(64)
    tuned = {}
    for key, weight in base.items():
        matrix = weight.reshape(weight.shape[0], -1)
        strong = normal(matrix.shape[0], 4) @ normal(4, matrix.shape[1]) * 0.1
        tuned[key] = weight + (strong + normal(*matrix.shape) * 1e-3).reshape(weight.shape)
    return write(tmp_path / "base.safetensors", base), write(tmp_path / "tuned.safetensors", tuned)


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "4"),
        ("--mode", "fro", "--param", "0.99"),
        ("--mode", "ratio", "--param", "0.1"),
        ("--mode", "error", "--error", "0.05"),
        ("--rank", "4", "--use-conv-cp"),
        ("--rank", "4", "--sparse-bias"),
        ("--algo", "full"),
        ("--algo", "dora", "--rank", "4"),
        ("--algo", "lokr", "--factor", "4"),
        ("--algo", "lokr", "--factor", "4", "--rank", "4"),
    ],
    ids=" ".join,
)
def test_extract(options: tuple[str, ...], checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    cpu, cuda, reports = on_both(tmp_path, "extract", *checkpoints, *options)

    # The captured energy is the best of its rank on both, within the 0.06 % of what is left
    # at which the subspace stops; the vectors are within its root of what is left.
    left = [1 - report["captured"]["all"] for report in reports]
    assert abs(left[0] - left[1]) <= 1e-3 * left[0] + 1e-6
    assert [m["rank"] for m in reports[0]["modules"]] == [m["rank"] for m in reports[1]["modules"]]
    assert_same_changes(tmp_path, checkpoints[0], (cpu, cuda), share=1e-3)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("lora", ("--rank", "4")),
        ("lora", ("--method", "sv_fro", "--param", "0.8")),
        ("lora", ("--error", "0.3")),
        ("loha", ("--rank", "4", "--to", "lora")),
    ],
    ids=str,
)
def test_resize(adapter: str, options: tuple[str, ...], tmp_path: Path) -> None:
    cpu, cuda, reports = on_both(tmp_path, "resize", DATA / f"{adapter}.safetensors", *options)

    assert reports[0]["ranks"] == reports[1]["ranks"]
    # Gaps between neighbouring values of random factors are 1e-3 and more of them: float32
    # factors through float64 Grams keep their vectors to 1e-4.
    assert_same_changes(tmp_path, DATA / "base.safetensors", (cpu, cuda), share=1e-4)


def test_merge(tmp_path: Path) -> None:
    cpu, cuda, _ = on_both(tmp_path, "merge", DATA / "lora.safetensors", f"{DATA / 'loha.safetensors'}:0.5")

    assert_same_changes(tmp_path, DATA / "base.safetensors", (cpu, cuda), share=16 * EPS)


@pytest.mark.parametrize("grid", [(1, 1), (320, 1), (3, 5)], ids=str)
def test_scaled_float8(grid: tuple[int, int], tmp_path: Path) -> None:
    """The sum may round to the other neighbour, and with it the scale; nothing else may differ."""
    layer = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    name = "weight_scale_inv" if grid == (3, 5) else "weight_scale"
    tensors = {
        f"{layer}.weight": (
            (100 * torch.randn(320, 640, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
        ),
        f"{layer}.{name}": 0.01 + torch.rand(grid, generator=generator) / 100,
    }
    base = write(tmp_path / "base.safetensors", tensors)
    module = "lora_unet_" + layer.removeprefix(UNET).replace(".", "_")
    adapter = write(
        tmp_path / "lora.safetensors",
        {
            f"{module}.lora_up.weight": torch.randn(320, 4, generator=generator),
            f"{module}.lora_down.weight": torch.randn(4, 640, generator=generator),
            f"{module}.alpha": torch.tensor(4.0),
        },
    )
    found = []
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.safetensors"
        succeed("bake", base, adapter, "--device", device, "--verify", "-o", output)
        found.append(read(output))
    scales = [one[f"{layer}.{name}"].double() for one in found]
    assert torch.allclose(scales[0], scales[1], rtol=16 * EPS, atol=0)
    stored = [one[f"{layer}.weight"].float() for one in found]
    assert (stored[0] != stored[1]).double().mean() < 1e-3
    # The other neighbour is at most an eighth of the value away, float8's eps, or the smallest step.
    assert ((stored[0] - stored[1]).abs() <= (stored[0].abs() / 8).clamp_min(2.0**-9)).all()
