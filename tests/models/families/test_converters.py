"""The tables against diffusers' own converters of published checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import single_file_utils
from models.families.published import MODELS
from models.families.states import State, diffusers_state, native_state

from lycotool.models.families import FAMILIES


def _ldm(config: dict[str, object]) -> Callable[[State], State]:
    return lambda state: single_file_utils.convert_ldm_unet_checkpoint(
        _prefixed("model.diffusion_model.", state), {"layers_per_block": 2, **config}
    )


def _sd3(state: State) -> State:
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        {**state, "pos_embed": torch.zeros(1)}
    )
    del converted["pos_embed.pos_embed"]
    return converted


def _anima(state: State) -> State:
    transformer = {key: tensor for key, tensor in state.items() if not key.startswith("llm_adapter.")}
    adapter = {key: tensor for key, tensor in state.items() if key not in transformer}
    converted = single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(
        _prefixed("net.", transformer)
    )
    return converted | {
        key.replace("llm_adapter.", "text_conditioner."): tensor for key, tensor in adapter.items()
    }


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


CONVERTERS: dict[str, Callable[[State], State]] = {
    "sd1": _ldm({}),
    "sd2": _ldm({}),
    "sdxl": _ldm({"addition_embed_type": "text_time"}),
    "sd3": _sd3,
    "flux1": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "lumina2": single_file_utils.convert_lumina2_to_diffusers,
    "hunyuan-video": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "anima": _anima,
}


@pytest.mark.parametrize(("family", "variant"), [model for model in MODELS if model[0] in CONVERTERS])
def test_published_checkpoint_converts_to_what_the_tables_say(family: str, variant: str) -> None:
    expected = diffusers_state(family, variant)
    converted = CONVERTERS[family](native_state(family, variant, expected))
    assert converted.keys() == expected.keys()
    for key, tensor in converted.items():
        assert torch.equal(tensor, expected[key]), key


def test_qwen_image_is_published_in_diffusers_names() -> None:
    assert all(rule.diffusers == (rule.native,) for rule in FAMILIES["qwen-image"].unet.rules)
