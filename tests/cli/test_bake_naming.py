"""Adapters whose modules are named, split and fused otherwise than the checkpoint's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import read, run, succeed, write
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
WIDTH = 12

#: A Flux block natively: layer to (rows, columns), and diffusers' parts with their rows.
NATIVE = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "single_blocks.1.linear1": (7 * WIDTH, WIDTH),
    "single_blocks.1.linear2": (WIDTH, 5 * WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}
PARTS = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
HEIGHTS = {"to_q": WIDTH, "to_k": WIDTH, "to_v": WIDTH, "proj_mlp": 4 * WIDTH}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_diffusers(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Native weights under diffusers' names: rows split, the halves of ``norm_out`` swapped."""
    found = {}
    for name, parts in PARTS.items():
        weight = native[name]
        if name.startswith("final_layer.ada"):
            weight = torch.cat(weight.chunk(2)[::-1])
        start = 0
        for part in parts:
            height = HEIGHTS.get(part.split(".")[-1], len(weight)) if len(parts) > 1 else len(weight)
            found[part] = weight[start : start + height]
            start += height
    return found


def as_native(diffusers: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: torch.cat([diffusers[part] for part in parts]) for name, parts in PARTS.items()}
    ada = "final_layer.adaLN_modulation.1"
    return found | {ada: torch.cat(found[ada].chunk(2)[::-1])}


def adapter(
    shapes: dict[str, tuple[int, int]], kind: str, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter for these layers, and the change of each in float64."""
    tensors, changes = {}, {}
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        key = prefix + name

        def factor(*shape: int, index: int = index) -> Tensor:
            return normal(*shape, seed=100 * index + sum(shape))

        if kind == "lora":
            up, down = factor(rows, 2), factor(2, columns)
            tensors |= {
                f"{key}.lora_up.weight": up,
                f"{key}.lora_down.weight": down,
                f"{key}.alpha": torch.tensor(1.0),
            }
            changes[name] = 0.5 * up.double() @ down.double()
        elif kind == "loha":
            slots = [factor(rows, 2), factor(2, columns), 0.5 * factor(rows, 2), 0.3 * factor(2, columns)]
            tensors |= {
                f"{key}.hada_{slot}": t
                for slot, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), slots, strict=True)
            }
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
            a, b, c, d = (t.double() for t in slots)
            changes[name] = (a @ b) * (c @ d)
        else:
            tensors[f"{key}.diff"] = factor(rows, columns)
            changes[name] = tensors[f"{key}.diff"].double()
    return tensors, changes


def assert_added(before: dict[str, Tensor], after: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    for name, weight in before.items():
        expected = weight.double() + changes[name]
        # One rounding of the sum, and a few of the factors' products.
        assert (after[name].double() - expected).abs().max() <= 16 * EPS * expected.abs().max(), name


@pytest.mark.parametrize("kind", ["lora", "loha", "full"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_split_modules_into_a_fused_checkpoint(kind: str, prefix: str, tmp_path: Path) -> None:
    weights = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(NATIVE.items())}
    checkpoint = write(tmp_path / "base.safetensors", {f"{prefix}{n}.weight": w for n, w in weights.items()})
    shapes = {name: tuple(w.shape) for name, w in as_diffusers(weights).items()}
    tensors, changes = adapter(shapes, kind, "transformer.")
    source = write(tmp_path / "adapter.safetensors", tensors)

    succeed("bake", checkpoint, source, "-o", tmp_path / "out.safetensors")

    after = {
        k.removeprefix(prefix).removesuffix(".weight"): t
        for k, t in read(tmp_path / "out.safetensors").items()
    }
    assert_added(weights, after, as_native(changes))


@pytest.mark.parametrize("kind", ["lora", "loha", "full"])
@pytest.mark.parametrize("names", ["lora_unet_", "diffusion_model."])
def test_fused_modules_into_a_split_checkpoint(kind: str, names: str, tmp_path: Path) -> None:
    native = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(NATIVE.items())}
    weights = as_diffusers(native)
    checkpoint = write(
        tmp_path / "base.safetensors", {f"transformer.{n}.weight": w for n, w in weights.items()}
    )
    tensors, changes = adapter(NATIVE, kind, "")
    renamed = {
        (names + module.replace(".", "_" if names.endswith("_") else ".")) + key.removeprefix(module): tensor
        for key, tensor in tensors.items()
        for module in NATIVE
        if key.startswith(f"{module}.")
    }
    source = write(tmp_path / "adapter.safetensors", renamed)

    succeed("merge", checkpoint, source, "-o", tmp_path / "out.safetensors")

    after = {
        k.removeprefix("transformer.").removesuffix(".weight"): t
        for k, t in read(tmp_path / "out.safetensors").items()
    }
    assert_added(weights, after, as_diffusers(changes))


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    native = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(NATIVE.items())}
    weights = {f"transformer.{n}.weight": w for n, w in as_diffusers(native).items()}
    checkpoint = write(tmp_path / "base.safetensors", weights)
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    source = write(
        tmp_path / "lokr.safetensors",
        {
            f"{module}.lokr_w1": normal(2, 3, seed=1),
            f"{module}.lokr_w2": normal(18, 4, seed=2),
            f"{module}.alpha": torch.tensor(1.0),
        },
    )

    result = run("bake", checkpoint, source, "-o", tmp_path / "out.safetensors")

    assert result.exit_code == 5
    assert module in result.stderr
    assert "--algo lora" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()
