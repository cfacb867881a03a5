"""Micro Stable Diffusion models that train in seconds on one thread, as folders and single files.

The models are the real classes of diffusers and transformers: a UNet of two levels with one
resnet per block, a VAE that halves the image, text encoders of two layers. They follow the
rules that the published ones follow where shapes do not tell (8 heads in SD 1's UNet, heads
of 64 elsewhere, 32 groups in norms), and the vocabulary is CLIP's, so that real token ids
fit. The weights are random, so nothing that they make looks like anything.

``architectures.py`` has the published structure at small widths instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .architectures import (
    SD1_CLIP_PREFIX,
    SD2_CLIP_PREFIX,
    SDXL_CLIP_PREFIXES,
    UNET_PREFIX,
    VAE_PREFIX,
    schedule_buffers,
)
from .ldm_names import StateDict, clip_to_ldm, clip_to_openclip, unet_to_ldm, vae_to_ldm, with_prefix

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")

#: Widths of the UNet's levels: 32 groups must divide them.
UNET_WIDTHS = (32, 64)
VAE_WIDTHS = (32, 32)
#: Slots of a UNet level in LDM's numbers: one resnet, and a downsampler or a second resnet.
SLOTS = 2
TEXT_WIDTH = 32
SECOND_TEXT_WIDTH = 64
TEXT_LAYERS = 2
VOCABULARY = 49408
BOS, EOS = 49406, 49407
TIME_ID_WIDTH = 8

# The constructors of diffusers have no annotations.
UNET: Any = UNet2DConditionModel
VAE: Any = AutoencoderKL
TEXT: Any = CLIPTextModel
TEXT_WITH_PROJECTION: Any = CLIPTextModelWithProjection


@dataclass(frozen=True)
class MicroBase:
    """A micro model in memory; ``text_encoders`` of SD 2 lack the last layer that its file has."""

    family: Family
    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    seed: int


def micro_base(family: Family, *, seed: int = 0, in_channels: int = 4) -> MicroBase:
    """Build a micro model with seeded random weights, in float32 and evaluation mode."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        models = _unet(family, in_channels), _vae(family), _text_encoders(family)
    for model in (*models[:2], *models[2]):
        model.eval().requires_grad_(False)
    return MicroBase(family, *models, seed)


def _unet(family: Family, in_channels: int) -> Any:
    attention = (False, True) if family == "sdxl" else (True, False)
    extra: dict[str, Any] = {}
    if family == "sdxl":
        extra = {
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": SECOND_TEXT_WIDTH + 6 * TIME_ID_WIDTH,
        }
    return UNET(
        sample_size=16,
        in_channels=in_channels,
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        down_block_types=tuple(f"{'CrossAttn' * has}DownBlock2D" for has in attention),
        up_block_types=tuple(f"{'CrossAttn' * has}UpBlock2D" for has in attention[::-1]),
        cross_attention_dim=TEXT_WIDTH + (SECOND_TEXT_WIDTH if family == "sdxl" else 0),
        # In spite of its name, the number of heads.
        attention_head_dim=8 if family == "sd1" else tuple(max(1, width // 64) for width in UNET_WIDTHS),
        use_linear_projection=family != "sd1",
        **extra,
    )


def _vae(family: Family) -> Any:
    return VAE(
        sample_size=32,
        block_out_channels=VAE_WIDTHS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_WIDTHS),
        latent_channels=4,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )


def _text_config(width: int, activation: str, layers: int = TEXT_LAYERS) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _text_encoders(family: Family) -> tuple[Any, ...]:
    if family == "sd2":
        return (TEXT(_text_config(TEXT_WIDTH, "gelu")),)
    first = TEXT(_text_config(TEXT_WIDTH, "quick_gelu"))
    if family == "sd1":
        return (first,)
    return first, TEXT_WITH_PROJECTION(_text_config(SECOND_TEXT_WIDTH, "gelu"))


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer without merges: every byte is a token, and ids fit the real vocabulary."""
    symbols = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(number) for number in symbols] + [chr(256 + number) for number in range(68)]
    vocabulary = {name: number for number, name in enumerate([*names, *(f"{n}</w>" for n in names)])}
    vocabulary |= {"<|startoftext|>": BOS, "<|endoftext|>": EOS}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)


def write_folder(
    base: MicroBase,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    prediction: str = "epsilon",
    zero_terminal_snr: bool = False,
) -> Path:
    """Save as a diffusers folder, the way diffusers itself saves one."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    unet, vae, *text_encoders = (
        deepcopy(model).to(dtype) for model in (base.unet, base.vae, *base.text_encoders)
    )
    models = {"unet": unet, "vae": vae, "text_encoder": text_encoders[0]}
    models["tokenizer"] = tokenizer("<|endoftext|>" if base.family != "sd2" else "!")
    pipeline: Any
    if base.family == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            **models,
            text_encoder_2=text_encoders[1],
            tokenizer_2=tokenizer("!"),
            scheduler=scheduler,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **models,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path)
    return path


def single_file(base: MicroBase, *, dtype: torch.dtype = torch.float32) -> StateDict:
    """The state dict of the single file: LDM's names for SD 1 and 2, SGM's for SDXL."""
    state = with_prefix(UNET_PREFIX, unet_to_ldm(base.unet.state_dict(), SLOTS))
    state |= with_prefix(VAE_PREFIX, vae_to_ldm(base.vae.state_dict()))
    texts = [_with_text_model(model.state_dict()) for model in base.text_encoders]
    if base.family == "sd1":
        state |= with_prefix(SD1_CLIP_PREFIX, clip_to_ldm(texts[0]))
    elif base.family == "sd2":
        state |= with_prefix(SD2_CLIP_PREFIX, _openclip_with_last_layer(texts[0], base.seed))
    else:
        second = clip_to_openclip(texts[1]) | {"logit_scale": torch.tensor(100.0).log()}
        state |= with_prefix(SDXL_CLIP_PREFIXES[0], clip_to_ldm(texts[0]))
        state |= with_prefix(SDXL_CLIP_PREFIXES[1], second)
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    return state if base.family == "sdxl" else state | schedule_buffers()


def write_file(
    base: MicroBase,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Save as a single file; ``extra`` are further tensors, such as the marker ``v_pred``."""
    state = single_file(base, dtype=dtype) | dict(extra or {})
    save_file({name: tensor.clone() for name, tensor in state.items()}, path, dict(metadata or {}))
    return path


def _with_text_model(state: StateDict) -> StateDict:
    """Put the level ``text_model`` back, which transformers 5.6 took out of one of two classes."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in state.items()
    }


def _openclip_with_last_layer(state: StateDict, seed: int) -> StateDict:
    """OpenCLIP-H as published: one layer more than SD 2 uses, a projection, a temperature."""
    result = clip_to_openclip(state)
    layer, generator = "transformer.resblocks.", torch.Generator().manual_seed(seed)
    for name, tensor in list(result.items()):
        if name.startswith(f"{layer}{TEXT_LAYERS - 1}."):
            last = name.replace(f"{layer}{TEXT_LAYERS - 1}.", f"{layer}{TEXT_LAYERS}.")
            result[last] = torch.randn(tensor.shape, generator=generator)
    result["text_projection"] = torch.randn(TEXT_WIDTH, TEXT_WIDTH, generator=generator)
    result["logit_scale"] = torch.tensor(100.0).log()
    return result
