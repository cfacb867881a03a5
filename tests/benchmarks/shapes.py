"""Shapes of real models: of their linear and convolution layers, and of whole checkpoints.

They stand in ``layer_shapes.json``, so that diffusers need not be there; ``PYTHONPATH=tests
python -m benchmarks.shapes`` makes that file from diffusers' and transformers' own models.
"""

from __future__ import annotations

import json
import math
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


def checkpoint(model: str) -> dict[str, Shape]:
    """Shape of every tensor of a checkpoint in one file, under the names such files have."""
    return dict(sorted(expanded(json.loads(SHAPES.read_text())[f"{model} checkpoint"])))


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
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from makers import architectures as arch
    from makers.ldm_names import clip_to_ldm, clip_to_openclip, unet_to_ldm, vae_to_ldm, with_prefix
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
        vae = AutoencoderKL(
            sample_size=512, latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
            )
        )
        large = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32,
                projection_dim=1280, hidden_act="gelu",
            )
        )  # fmt: skip

        # transformers 5 dropped this level, which checkpoints and adapters have.
        text = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in clip.state_dict().items()}
        text = clip_to_ldm(text)
        openclip = clip_to_openclip(large.state_dict())
        openclip["logit_scale"] = torch.tensor(1.0)

        def single(unet: torch.nn.Module, *texts: tuple[str, Mapping[str, torch.Tensor]]) -> dict[str, Shape]:
            state = with_prefix(arch.UNET_PREFIX, unet_to_ldm(unet.state_dict()))
            state |= with_prefix(arch.VAE_PREFIX, vae_to_ldm(vae.state_dict()))
            for prefix, one in texts:
                state |= with_prefix(prefix, dict(one))
            return {key: tuple(t.shape) for key, t in state.items() if t.is_floating_point()}

        first, second = arch.SDXL_CLIP_PREFIXES
        files = {
            "sd15 checkpoint": single(sd15, (arch.SD1_CLIP_PREFIX, text)),
            "sdxl checkpoint": single(sdxl, (first, text), (second, openclip)),
        }

    def of(model: torch.nn.Module, prefix: str) -> dict[str, Shape]:
        return {
            f"{prefix}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }

    shapes = {
        "sd15": of(sd15, "lora_unet") | of(clip, "lora_te.text_model"),
        "sdxl": of(sdxl, "lora_unet"),
        **files,
    }
    trees = {model: shared(found) for model, found in shapes.items()}
    for model, found in shapes.items():
        if dict(expanded(trees[model])) != found:
            raise AssertionError(model)
        print(
            f"{model}: {len(found)} shapes, {2 * sum(map(math.prod, found.values())) / 1e9:.2f} GB as float16"
        )
    SHAPES.write_text(json.dumps(trees, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_shapes()
