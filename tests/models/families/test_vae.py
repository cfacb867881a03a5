"""The VAE's table against diffusers' class and its converter of published checkpoints."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from lycotool.models.families.table import Site
from lycotool.models.families.vae import POINTWISE, current_name, levels_of, vae_table
from lycotool.models.naming import flat

State = dict[str, torch.Tensor]

#: Widths with and without a change of channels, and resnets of a level.
SHAPES = [((8, 16), 1), ((8, 16, 32, 32), 2), ((8, 8, 16), 2)]


def _vae(widths: tuple[int, ...], resnets: int) -> AutoencoderKL:
    levels = len(widths)
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=resnets,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )


def _site(levels: int, path: str) -> Site:
    ((_naming, site),) = vae_table(levels).find(path)
    return site


def _to_ldm(state: State, levels: int) -> State:
    native = {}
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        ldm = _site(levels, path).path("native")
        assert ldm is not None
        is_pointwise = ldm.endswith(POINTWISE) and name == "weight"
        native[f"{ldm}.{name}"] = tensor[:, :, None, None] if is_pointwise else tensor
    return native


@pytest.mark.parametrize(("widths", "resnets"), SHAPES)
@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_ldm_names_convert_to_what_diffusers_has(widths: tuple[int, ...], resnets: int, prefix: str) -> None:
    model = _vae(widths, resnets)
    expected = model.state_dict()
    native = _to_ldm(expected, len(widths))
    assert len(native) == len(expected)
    converted = convert_ldm_vae_checkpoint(
        {prefix + key: tensor for key, tensor in native.items()}, dict(model.config)
    )
    assert converted.keys() == expected.keys()
    for key, tensor in converted.items():
        assert torch.equal(tensor, expected[key]), key
    assert levels_of(expected) == levels_of(native) == len(widths)


def test_paths_and_back() -> None:
    modules = {key.rpartition(".")[0] for key in _vae((8, 8, 16, 16), 2).state_dict()}
    for path in modules:
        site = _site(4, path)
        native = site.path("native")
        assert native is not None
        assert site.path("diffusers") == path
        assert _site(4, native) == _site(4, flat(native)) == _site(4, flat(path)) == site


def test_earlier_names_of_the_attention() -> None:
    model = _vae((8, 16), 1)
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key in model.state_dict():
        earlier = key
        for new, old in before.items():
            earlier = earlier.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        assert current_name(earlier) == key
    assert current_name("decoder.mid_block.attentions.0.query") == "decoder.mid_block.attentions.0.to_q"


def test_levels_of_something_else() -> None:
    assert levels_of(["down_blocks.3.resnets.0.conv1", "input_blocks.1.0.op"]) == 0
