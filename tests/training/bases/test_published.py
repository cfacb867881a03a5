"""The published models at their real size, on the meta device: configs, names, counts.

The shapes of their single files come from the makers' table, which is independent of the
package's and is itself compared with diffusers' converters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers.ldm_names import clip_to_openclip, unet_to_ldm, vae_to_ldm
from torch import nn
from training.published_bases import published_base

from lycotool.models.families import FAMILIES
from lycotool.models.families.vae import vae_table
from lycotool.training.bases import build, configs, sources
from lycotool.training.bases.configs import FamilyName
from lycotool.training.presets import PRESETS
from lycotool.training.targets import find_targets

NAMES: tuple[FamilyName, ...] = ("sd1", "sd2", "sdxl")


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _state(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def _vae(family: FamilyName) -> nn.Module:
    return build.empty_vae(configs.published(family)["vae"], path=family)


@pytest.mark.parametrize(
    ("family", "keys", "millions"), [("sd1", 686, 859.5), ("sd2", 686, 865.9), ("sdxl", 1680, 2567.5)]
)
def test_unet(family: FamilyName, keys: int, millions: float) -> None:
    """Known numbers of keys and parameters; the config that shapes tell; the keys of the file."""
    base = published_base(family)
    state = _state(base.unet)
    native = _shapes(unet_to_ldm(state))
    assert len(native) == keys
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    expected = configs.published(family)["unet"]
    found = configs.unet_config(family, native)
    assert configs.with_pooled_width(found, 1280) == expected if family == "sdxl" else found == expected
    places = sources.native(build.parameter_shapes(base.unet), base.unet_table, "")
    assert {place.key: place.shape for place in places.values()} == native


@pytest.mark.parametrize("family", NAMES)
def test_unet_table_is_the_family_s(family: FamilyName) -> None:
    assert set(published_base(family).unet_table.rules) == set(FAMILIES[family].unet.rules)


@pytest.mark.parametrize("family", NAMES)
def test_vae(family: FamilyName) -> None:
    model = _vae(family)
    native = _shapes(vae_to_ldm(_state(model)))
    assert len(native) == 248
    assert configs.vae_config(family, native) == configs.published(family)["vae"]
    assert configs.vae_config(family, build.parameter_shapes(model)) == configs.published(family)["vae"]
    places = sources.native(build.parameter_shapes(model), vae_table(), "")
    assert {place.key for place in places.values()} == native.keys()


@pytest.mark.parametrize("family", NAMES)
def test_text_encoders(family: FamilyName) -> None:
    for number, model in enumerate(published_base(family).text_encoders):
        config = configs.published(family)["text_encoders"][number]
        parameters = build.parameter_shapes(model)
        found = configs.clip_config(config | {"hidden_size": 1, "num_hidden_layers": 1}, parameters)
        assert found == config
        if family == "sd1" or (family == "sdxl" and number == 0):
            continue
        state = {
            name if name.startswith("text_projection") else f"text_model.{name}": torch.empty(
                shape, device="meta"
            )
            for name, shape in parameters.items()
        }
        native = _shapes(clip_to_openclip(state))
        assert {place.key for place in sources.openclip(parameters, "").values()} == native.keys()
        layers = config["num_hidden_layers"]
        assert configs.openclip_config(config | {"hidden_size": 1}, native, layers) == config


@settings(max_examples=8, deadline=None)
@given(data=st.data(), family=st.sampled_from(NAMES), levels=st.integers(2, 4), resnets=st.integers(1, 3))
def test_unets_of_other_depths(data: st.DataObject, family: FamilyName, levels: int, resnets: int) -> None:
    """Any number of levels and resnets, attention at any level: names and config from the shapes."""
    widths = data.draw(st.lists(st.sampled_from([32, 64, 96]), min_size=levels, max_size=levels))
    has = data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels).filter(any))
    config = configs.published(family)["unet"] | {
        "block_out_channels": widths,
        "layers_per_block": resnets,
        "down_block_types": [f"{'CrossAttn' * one}DownBlock2D" for one in has],
        "up_block_types": [f"{'CrossAttn' * one}UpBlock2D" for one in reversed(has)],
        "cross_attention_dim": 24,
    }
    if family != "sd1":
        config["attention_head_dim"] = [max(1, width // 64) for width in widths]
    if family == "sdxl":
        config["transformer_layers_per_block"] = [data.draw(st.integers(1, 3)) if one else 1 for one in has]
    model = build.empty_unet(config, path=family)
    native = _shapes(unet_to_ldm(_state(model), resnets + 1))
    places = sources.native(build.parameter_shapes(model), configs.unet_table(family, config), "")
    assert {place.key: place.shape for place in places.values()} == native
    assert configs.unet_config(family, native) == config


@settings(max_examples=5, deadline=None)
@given(widths=st.lists(st.sampled_from([32, 64]), min_size=1, max_size=4), resnets=st.integers(1, 3))
def test_vaes_of_other_depths(widths: list[int], resnets: int) -> None:
    config = configs.published("sd1")["vae"] | {
        "block_out_channels": widths,
        "layers_per_block": resnets,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    model = build.empty_vae(config, path="vae")
    native = _shapes(vae_to_ldm(_state(model)))
    assert configs.vae_config("sd1", native) == config
    places = sources.native(build.parameter_shapes(model), vae_table(len(widths)), "")
    assert {place.key for place in places.values()} == native.keys()


# --- transformers before and after 5.6 -------------------------------------------------------


class _WithLevel(nn.Module):
    """``CLIPTextModel`` as it was before: everything inside ``text_model``."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


class _WithoutLevel(nn.Module):
    """As it may become: nothing inside ``text_model``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = getattr(model, "text_model", model)
        self.embeddings, self.encoder, self.final_layer_norm = (
            inner.embeddings,
            inner.encoder,
            inner.final_layer_norm,
        )
        if hasattr(model, "text_projection"):
            self.text_projection = model.text_projection


@pytest.mark.parametrize("family", NAMES)
def test_names_do_not_depend_on_the_library_s_paths(family: FamilyName) -> None:
    import dataclasses

    base = published_base(family)
    expected = [target.name for target in find_targets(base, PRESETS["full"], train_unet=False)]
    shapes = [build.parameter_shapes(model) for model in base.text_encoders]
    flat = [_WithoutLevel(model) for model in base.text_encoders]
    for models in (flat, [_WithLevel(model) for model in flat]):
        other = dataclasses.replace(base, text_encoders=models)
        found = find_targets(other, PRESETS["full"], train_unet=False)
        assert [target.name for target in found] == expected
        assert [build.parameter_shapes(model) for model in models] == shapes
