"""The maker of micro models: its single files read by diffusers' converters give its models back.

The converters go the other way and were written by others, so agreement shows that the names
in the files are the real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from makers import bases
from makers.architectures import SD1_CLIP_PREFIX, SD2_CLIP_PREFIX, SDXL_CLIP_PREFIXES

CONVERTERS: Any = single_file_utils


def _assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def _text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): value for name, value in state.items()}


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_converters_of_diffusers_give_the_models_back(family: bases.Family) -> None:
    base = bases.micro_base(family, seed=1)
    state = bases.single_file(base)
    # The converters change the dict that they are given.
    _assert_same(
        CONVERTERS.convert_ldm_unet_checkpoint(dict(state), base.unet.config), base.unet.state_dict()
    )
    _assert_same(CONVERTERS.convert_ldm_vae_checkpoint(dict(state), base.vae.config), base.vae.state_dict())
    encoders = [_text(encoder.state_dict()) for encoder in base.text_encoders]
    if family != "sd2":
        prefix = SD1_CLIP_PREFIX if family == "sd1" else SDXL_CLIP_PREFIXES[0]
        own = {name: value for name, value in state.items() if name.startswith(prefix)}
        converted = _text(CONVERTERS.convert_ldm_clip_checkpoint(own))
        converted.pop("embeddings.position_ids")
        _assert_same(converted, encoders[0])
    if family != "sd1":
        prefix = SD2_CLIP_PREFIX if family == "sd2" else SDXL_CLIP_PREFIXES[1]
        # The converter leaves out the last layer of the published OpenCLIP-H by its number, 23.
        unused = f"resblocks.{bases.TEXT_LAYERS}."
        own = {name: value for name, value in state.items() if unused not in name}
        converted = CONVERTERS.convert_open_clip_checkpoint(base.text_encoders[-1], own, prefix=prefix)
        _assert_same(_text(converted), encoders[-1])


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (bases.single_file(bases.micro_base("sd1", seed=seed)) for seed in (0, 0, 1))
    _assert_same(first, again)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert not torch.equal(first[key], other[key])
