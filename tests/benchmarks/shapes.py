"""Shapes of the linear and convolution layers of real models, for the benchmarks.

They stand in ``layer_shapes.json``, so that diffusers need not be there; ``python
tests/benchmarks/shapes.py`` makes that file from diffusers' and transformers' own models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

# Only the standard library here: a child's maxrss starts from its parent's size.

if TYPE_CHECKING:
    import torch

SHAPES = Path(__file__).with_name("layer_shapes.json")
QUICK = 8

Shape = tuple[int, ...]
Tree = dict[str, Union["Tree", list[int]]]


def layers(model: str, *, quick: bool = False) -> dict[str, Shape]:
    """Weight shape by dotted path, which begins with ``lora_unet.`` or ``lora_te.``."""
    found = dict(sorted(expanded(json.loads(SHAPES.read_text())[model])))
    return dict(list(found.items())[:: QUICK if quick else 1])


def expanded(tree: Tree, path: str = "") -> Iterator[tuple[str, Shape]]:
    """Every path of a tree whose equal branches share an entry, ``to_k to_v`` or ``0 1 2``."""
    for names, branch in tree.items():
        for name in names.split():
            if isinstance(branch, list):
                yield path + name, tuple(branch)
            else:
                yield from expanded(branch, f"{path}{name}.")


def shared(shapes: Mapping[str, Shape]) -> Tree:
    """The tree that :func:`expanded` undoes."""
    branches: dict[str, dict[str, Shape]] = {}
    leaves: dict[str, list[int]] = {}
    for path, shape in shapes.items():
        name, dot, rest = path.partition(".")
        if dot:
            branches.setdefault(name, {})[rest] = shape
        else:
            leaves[name] = list(shape)
    whole: dict[str, Tree | list[int]] = {**leaves, **{name: shared(rest) for name, rest in branches.items()}}
    equal: dict[str, list[str]] = {}
    for name, branch in whole.items():
        equal.setdefault(json.dumps(branch, sort_keys=True), []).append(name)
    return {" ".join(names): whole[names[0]] for names in equal.values()}


def write_shapes() -> None:
    """Read the shapes off the models themselves, on the meta device."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):  # shapes without memory
        sd15 = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        )  # fmt: skip
        sdxl = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))

    def of(model: torch.nn.Module, prefix: str) -> dict[str, Shape]:
        return {
            # transformers 5 dropped a level that adapters have.
            f"{prefix}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }

    shapes = {
        "sd15": of(sd15, "lora_unet") | of(clip, "lora_te.text_model"),
        "sdxl": of(sdxl, "lora_unet"),
    }
    trees = {model: shared(found) for model, found in shapes.items()}
    for model, found in shapes.items():
        if dict(expanded(trees[model])) != found:
            raise AssertionError(model)
        print(f"{model}: {len(found)} layers")
    SHAPES.write_text(json.dumps(trees, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_shapes()
