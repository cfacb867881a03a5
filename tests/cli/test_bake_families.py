"""Every family that lycotool knows: adapters in either naming, checkpoints in either, one file or shards.

The models have the published modules with all widths divided by the same number. What is fused
is put together by :mod:`models.families.states`, which is held against diffusers' converters.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers import read, succeed, write
from models.families.published import MODELS, parameter_shapes, sites
from models.families.states import State, native_state
from torch import Tensor

from lycotool.models.families import FAMILIES

EPS = torch.finfo(torch.float32).eps
RANK, ALPHA = 2, 1.0

Naming = Literal["native", "diffusers"]

#: The first variant of every family, and all of SD 3's, whose last context block is an exception.
CHOSEN = [
    model for model in MODELS if model[0] == "sd3" or model[1] == next(v for f, v in MODELS if f == model[0])
]


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The widths of a published tensor, divided where they can be."""
    return tuple(size // 64 if size % 64 == 0 else size for size in shape)


def normal(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


@functools.cache
def diffusers_state(family: str, variant: str) -> State:
    return {
        f"{path}.{name}": normal(f"{path}.{name}", small(shape))
        for path, parameters in parameter_shapes(family, variant).items()
        for name, shape in parameters.items()
        if name in ("weight", "bias")
    }


@functools.cache
def native_weights(family: str, variant: str) -> State:
    return native_state(family, variant, diffusers_state(family, variant))


def lora(weights: State, prefix: str, *, flat: bool) -> tuple[State, State]:
    """A LoRA for every matrix and kernel, and the changes of all tensors in float64."""
    tensors: State = {}
    changes = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in weights.items()}
    for key, weight in weights.items():
        path, _, slot = key.rpartition(".")
        if slot != "weight" or weight.ndim < 2:
            continue
        rows, columns, *kernel = weight.shape
        up = normal(f"{key} up", (rows, RANK, *(1 for _ in kernel)))
        down = normal(f"{key} down", (RANK, columns, *kernel))
        name = prefix + (path.replace(".", "_") if flat else path)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        product = up.double().flatten(1) @ down.double().flatten(1)
        changes[key] = ALPHA / RANK * product.view(weight.shape)
    return tensors, changes


def adaptable(family: str, variant: str, state: State) -> State:
    """The tensors of modules that both namings have."""
    known = {path for path, site in sites(family, variant) if site.rule.native is not None}
    return {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] in known}


def stored(folder: Path, state: State, storage: str, denoiser: str) -> tuple[Path, Path, str]:
    """Write a checkpoint: its path, where the result shall go, and what stands before its keys."""
    if storage == "folder":
        (folder / f"in/{denoiser}").mkdir(parents=True)
        write(folder / f"in/{denoiser}/diffusion_pytorch_model.safetensors", state)
        return folder / "in", folder / "out", ""
    prefix = "model.diffusion_model." if storage in ("native", "shards") else ""
    named = {prefix + key: tensor for key, tensor in state.items()}
    if storage != "shards":
        return write(folder / "in.safetensors", named), folder / "out.safetensors", prefix
    shards = {key: f"in-{number % 2}.safetensors" for number, key in enumerate(named)}
    for name in set(shards.values()):
        write(folder / name, {key: named[key] for key in named if shards[key] == name})
    index = folder / "in.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    return index, folder / "out.safetensors.index.json", prefix


def loaded(output: Path, prefix: str, denoiser: str) -> State:
    if output.is_dir():
        return read(output / denoiser / "diffusion_pytorch_model.safetensors")
    if output.name.endswith(".json"):
        names = set(json.loads(output.read_text())["weight_map"].values())
        found = {key: tensor for name in names for key, tensor in read(output.parent / name).items()}
    else:
        found = read(output)
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def assert_changed(after: State, before: State, changes: State) -> None:
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        exact = before[key].double() + changes[key]
        # A few products and sums in float32 and one rounding.
        assert (tensor.double() - exact).abs().max() <= 16 * EPS * exact.abs().max(), key


@pytest.mark.parametrize(
    ("adapter", "storage"),
    [("diffusers", "shards"), ("diffusers", "folder"), ("native", "native"), ("native", "single")],
    ids=str,
)
@pytest.mark.parametrize(("family", "variant"), CHOSEN, ids=str)
def test_every_layer_gets_its_change(
    family: str, variant: str, adapter: Naming, storage: str, tmp_path: Path
) -> None:
    diffusers = diffusers_state(family, variant)
    native = native_weights(family, variant)
    denoiser = FAMILIES[family].diffusers_prefix.rstrip(".")
    if adapter == "diffusers":
        tensors, changes = lora(adaptable(family, variant, diffusers), f"{denoiser}.", flat=False)
        changes = {key: torch.zeros(t.shape, dtype=torch.float64) for key, t in diffusers.items()} | changes
    else:
        tensors, changes = lora(native, "lora_unet_", flat=True)
    source = write(tmp_path / "adapter.safetensors", tensors)
    before = native if storage in ("native", "shards") else diffusers
    checkpoint, output, prefix = stored(tmp_path, before, storage, denoiser)

    report = succeed("bake", checkpoint, source, "--strict", "--json", "-o", output)

    matched = json.loads(report.stdout)["adapters"][0]
    assert matched["unmatched"] == []
    after = loaded(output, prefix, denoiser)
    if adapter == "diffusers" and storage == "folder":
        assert_changed(after, before, changes)
    elif adapter == "diffusers":
        assert_changed(after, before, native_state(family, variant, changes))
    elif storage == "native":
        assert_changed(after, before, changes)
    else:  # split back, what was given whole is whole again when it is put together
        assert after.keys() == before.keys()
        assert_changed(native_state(family, variant, after), native, changes)
