"""Compare single-file state dicts with the models by means of diffusers' own converter.

The converter goes the other way (single file to diffusers) and was written by others, so
agreement shows that the names of ``ldm_names.py`` are the real ones.
"""

from typing import Any

import torch
from diffusers.loaders import single_file_utils
from torch import nn

from . import architectures as arch
from .ldm_names import StateDict

DIFFUSERS: Any = single_file_utils  # its functions have no annotations


def _check_equal(what: str, got: StateDict, model: nn.Module) -> None:
    """Raise unless ``got`` has exactly the names and (in its own dtype) values of ``model``."""
    want = model.state_dict()
    if got.keys() != want.keys():
        raise AssertionError(f"{what}: names differ: {sorted(got.keys() ^ want.keys())[:8]}")
    for name, tensor in got.items():
        if not torch.equal(tensor, want[name].to(tensor.dtype)):
            raise AssertionError(f"{what}: {name} differs")


def _check_count(what: str, state: StateDict, prefix: str, count: int) -> None:
    found = sum(name.startswith(prefix) for name in state)
    if found != count:
        raise AssertionError(f"{what}: {found} tensors below {prefix}, not {count}")


def _check_unet_and_vae(what: str, state: StateDict, unet: nn.Module, vae: nn.Module) -> None:
    # The converters change the dict that they are given.
    _check_equal(f"{what} UNet", DIFFUSERS.convert_ldm_unet_checkpoint(dict(state), unet.config), unet)
    _check_equal(f"{what} VAE", DIFFUSERS.convert_ldm_vae_checkpoint(dict(state), vae.config), vae)
    _check_count(what, state, arch.VAE_PREFIX, 248)


def _check_clip(what: str, state: StateDict, model: nn.Module) -> None:
    converted = DIFFUSERS.convert_ldm_clip_checkpoint(dict(state))
    # transformers keeps the position ids as a buffer that it does not save.
    ids = converted.pop("text_model.embeddings.position_ids")
    if ids.dtype != torch.int64 or ids.tolist() != [list(range(77))]:
        raise AssertionError(f"{what}: wrong position ids")
    _check_equal(what, converted, model)


def check_sd1(state: StateDict) -> None:
    """Raise AssertionError unless ``state`` is the single file of the narrow SD 1.x models."""
    _check_unet_and_vae("SD1", state, arch.sd1_unet(), arch.sd1_vae())
    _check_clip("SD1 CLIP-L", state, arch.sd1_text_encoder())
    _check_count("SD1", state, arch.UNET_PREFIX, 686)
    _check_count("SD1", state, arch.SD1_CLIP_PREFIX, 197)
    _check_count("SD1", state, "", 1145)  # as v1-5-pruned-emaonly


def check_sd2(state: StateDict) -> None:
    """Raise AssertionError unless ``state`` is the single file of the narrow SD 2.x models."""
    _check_unet_and_vae("SD2", state, arch.sd2_unet(), arch.sd1_vae(22))
    model = arch.sd2_text_encoder()
    # SD2 does not use the last layer, and the converter leaves out resblocks.23.
    converted = DIFFUSERS.convert_open_clip_checkpoint(model, dict(state), prefix=arch.SD2_CLIP_PREFIX)
    _check_equal("SD2 OpenCLIP-H", converted, model)
    _check_count("SD2", state, arch.UNET_PREFIX, 686)
    _check_count("SD2", state, arch.SD2_CLIP_PREFIX, 294)


def check_sdxl(state: StateDict) -> None:
    """Raise AssertionError unless ``state`` is the single file of the narrow SDXL models."""
    _check_unet_and_vae("SDXL", state, arch.sdxl_unet(), arch.sd1_vae(33))
    first, second = arch.sdxl_text_encoders()
    _check_clip("SDXL CLIP-L", state, first)
    prefix = arch.SDXL_CLIP_PREFIXES[1]
    converted = DIFFUSERS.convert_open_clip_checkpoint(second, dict(state), prefix=prefix)
    _check_equal("SDXL OpenCLIP-G", converted, second)
    _check_count("SDXL", state, arch.UNET_PREFIX, 1680)
    _check_count("SDXL", state, prefix, 390)
    _check_count("SDXL", state, "", 2515)  # as sd_xl_base_1.0
