"""Narrow Stable Diffusion models with random weights, and their single-file state dicts.

The models are the real classes of diffusers and transformers with the real block structure
and depth of SD 1.x, SD 2.x and SDXL base, so that module names and tensor counts are those
of the published checkpoints.  Only widths, the number of attention heads and the vocabulary
are small.

All functions are deterministic: the values of a tensor depend only on the seed, the tensor's
name and its shape.
"""

import math
import zlib
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .ldm_names import (
    StateDict,
    clip_to_ldm,
    clip_to_openclip,
    unet_to_ldm,
    vae_to_ldm,
    with_prefix,
)

Module = TypeVar("Module", bound=nn.Module)

# The constructors of diffusers have no annotations.
UNET: Any = UNet2DConditionModel
VAE: Any = AutoencoderKL

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SD1_CLIP_PREFIX = "cond_stage_model.transformer."
SD2_CLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_PREFIXES = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

VOCABULARY = 100
CLIP_L_WIDTH = 16
CLIP_H_WIDTH = 16
CLIP_G_WIDTH = 32
TIME_ID_WIDTH = 8
TIME_IDS = 6  # SDXL: original size, crop position and target size, two numbers each


# --- random values -------------------------------------------------------------------------


def random_values(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Draw normal values that depend on nothing but the arguments.

    numpy and not torch draws them: torch's values differ in the last bits between vector
    instruction sets.  One generator per name keeps a tensor the same when a library
    reorders, adds or drops others.
    """
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(generator.standard_normal(shape) * std).float()


def _weight_std(name: str, tensor: Tensor) -> float:
    """Give a standard deviation like that of trained weights."""
    if tensor.ndim < 2 or "embedding.weight" in name:
        return 0.02
    fan_in = tensor[0].numel()
    return min(max(1 / math.sqrt(fan_in), 0.02), 0.1)


@torch.no_grad()
def randomise(module: Module, seed: int) -> Module:
    """Overwrite every parameter of ``module`` with seeded values and return it."""
    for name, parameter in module.named_parameters():
        values = random_values(name, tuple(parameter.shape), _weight_std(name, parameter), seed)
        if parameter.ndim == 1 and name.endswith("weight"):
            values += 1  # one-dimensional weights are those of norms
        parameter.copy_(values)
    return module.eval().requires_grad_(False)


# --- models --------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Put CLIPTextModel below ``text_model``.

    transformers removed this level from CLIPTextModel's module paths in version 5 (but not
    from CLIPTextModelWithProjection), while all checkpoints and adapter files have it.
    """

    def __init__(self, text_model: nn.Module) -> None:
        """Wrap a model whose paths start with ``embeddings`` and ``encoder``."""
        super().__init__()
        self.text_model = text_model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the last hidden state."""
        hidden: Tensor = self.text_model(input_ids)[0]
        return hidden


def _clip_config(width: int, layers: int, activation: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    )


def _text_encoder(config: CLIPTextConfig, seed: int) -> nn.Module:
    model = CLIPTextModel(config)
    # Older transformers have the level already.
    return randomise(model if hasattr(model, "text_model") else TextEncoder(model), seed)


def _sd_unet(seed: int, linear_projection: bool, heads: int | tuple[int, ...]) -> nn.Module:
    """Build the block structure that SD1 and SD2 share."""
    model: nn.Module = UNET(
        sample_size=8,
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        norm_num_groups=4,
        cross_attention_dim=CLIP_L_WIDTH,
        attention_head_dim=heads,  # in spite of its name, the number of heads
        use_linear_projection=linear_projection,
    )
    return randomise(model, seed)


def sd1_unet(seed: int = 10) -> nn.Module:
    """SD 1.x UNet: proj_in and proj_out are 1x1 convolutions."""
    return _sd_unet(seed, linear_projection=False, heads=8)


def sd1_text_encoder(seed: int = 11) -> nn.Module:
    """SD 1.x CLIP-L with 12 layers, paths starting with ``text_model``."""
    config = _clip_config(CLIP_L_WIDTH, 12, "quick_gelu", CLIP_L_WIDTH)
    return _text_encoder(config, seed)


def sd1_vae(seed: int = 12) -> nn.Module:
    """Autoencoder with the structure common to SD 1.x, SD 2.x and SDXL."""
    model: nn.Module = VAE(
        sample_size=32,
        block_out_channels=(4, 8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    return randomise(model, seed)


def sd2_unet(seed: int = 20) -> nn.Module:
    """SD 2.x UNet: proj_in and proj_out are linear layers."""
    return _sd_unet(seed, linear_projection=True, heads=(1, 2, 3, 3))


def sd2_text_encoder(seed: int = 21, layers: int = 23) -> nn.Module:
    """SD 2.x OpenCLIP-H in transformers form, without its unused last layer."""
    return _text_encoder(_clip_config(CLIP_H_WIDTH, layers, "gelu", CLIP_H_WIDTH), seed)


def sdxl_unet(seed: int = 30) -> nn.Module:
    """SDXL base UNet with the real depth of 1, 2 and 10 transformer layers."""
    model: nn.Module = UNET(
        sample_size=8,
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        norm_num_groups=4,
        cross_attention_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=CLIP_G_WIDTH + TIME_IDS * TIME_ID_WIDTH,
    )
    return randomise(model, seed)


def sdxl_text_encoders(seed: int = 31) -> tuple[nn.Module, nn.Module]:
    """CLIP-L with 12 layers, and OpenCLIP-G with 32 layers and a text projection."""
    clip_l = _clip_config(CLIP_L_WIDTH, 12, "quick_gelu", CLIP_L_WIDTH)
    clip_g = _clip_config(CLIP_G_WIDTH, 32, "gelu", CLIP_G_WIDTH)
    second = CLIPTextModelWithProjection(clip_g)
    return _text_encoder(clip_l, seed), randomise(second, seed + 1)


# --- single files --------------------------------------------------------------------------


def schedule_buffers() -> StateDict:
    """Noise schedule of SD 1.x and 2.x as the original code saves it, and two EMA scalars."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    alphas = 1 - betas
    product = np.cumprod(alphas)
    before = np.append(1.0, product[:-1])
    variance = betas * (1 - before) / (1 - product)
    buffers = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(product),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - product),
        "log_one_minus_alphas_cumprod": np.log(1 - product),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / product - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - product),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - product),
    }
    result = {name: torch.from_numpy(values).float() for name, values in buffers.items()}
    result["model_ema.decay"] = torch.tensor(0.9999)
    result["model_ema.num_updates"] = torch.tensor(1_000_000, dtype=torch.int32)
    return result


def _cast(state: StateDict, dtype: torch.dtype) -> StateDict:
    """Cast the floating-point tensors; position ids stay int64."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }


def _unet_and_vae(unet: nn.Module, vae: nn.Module) -> StateDict:
    return with_prefix(UNET_PREFIX, unet_to_ldm(unet.state_dict())) | with_prefix(
        VAE_PREFIX, vae_to_ldm(vae.state_dict())
    )


def sd1_single_file(dtype: torch.dtype = torch.float16) -> StateDict:
    """SD 1.x checkpoint: 686 UNet, 197 CLIP-L and 248 VAE tensors, and 14 buffers."""
    state = _unet_and_vae(sd1_unet(), sd1_vae())
    state |= with_prefix(SD1_CLIP_PREFIX, clip_to_ldm(sd1_text_encoder().state_dict()))
    return _cast(state, dtype) | schedule_buffers()


def sd2_single_file(dtype: torch.dtype = torch.float16) -> StateDict:
    """SD 2.x checkpoint: 686 UNet, 294 OpenCLIP and 248 VAE tensors, and 14 buffers.

    The file has all 24 layers of the text encoder although the last is never used, so it
    has one layer and a projection more than ``sd2_text_encoder()``.
    """
    state = _unet_and_vae(sd2_unet(), sd1_vae(22))
    text = clip_to_openclip(sd2_text_encoder(layers=24).state_dict())
    width = CLIP_H_WIDTH
    text["text_projection"] = random_values("text_projection", (width, width), 0.1, 21)
    text["logit_scale"] = torch.tensor(100.0).log()
    state |= with_prefix(SD2_CLIP_PREFIX, text)
    return _cast(state, dtype) | schedule_buffers()


def sdxl_single_file(dtype: torch.dtype = torch.float16) -> StateDict:
    """SDXL base checkpoint: 1680 UNet, 197 CLIP-L, 390 OpenCLIP-G and 248 VAE tensors."""
    first, second = sdxl_text_encoders()
    openclip = clip_to_openclip(second.state_dict())
    openclip["logit_scale"] = torch.tensor(100.0).log()
    state = _unet_and_vae(sdxl_unet(), sd1_vae(33))
    state |= with_prefix(SDXL_CLIP_PREFIXES[0], clip_to_ldm(first.state_dict()))
    state |= with_prefix(SDXL_CLIP_PREFIXES[1], openclip)
    return _cast(state, dtype)
