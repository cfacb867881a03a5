"""The text encoders against transformers' classes, and CLIP's OpenCLIP names against a converter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

from lycotool.models.families import FAMILIES
from lycotool.models.families.table import ModuleTable
from lycotool.models.families.text_encoders import CLIP, DECODER, T5
from lycotool.models.naming import flat

_SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_T5 = {"num_layers": 2, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 64}
_CLIP = transformers.CLIPTextConfig(**_SMALL, num_attention_heads=2, projection_dim=16)


def _decoder(name: str) -> Callable[[], torch.nn.Module]:
    config = getattr(transformers, f"{name}Config")(**_SMALL, **_HEADS, pad_token_id=0)
    return lambda: getattr(transformers, f"{name}Model")(config)


#: Name -> table, its levels that the table leaves out, a function that builds the model.
ENCODERS: dict[str, tuple[ModuleTable, str, Callable[[], torch.nn.Module]]] = {
    "CLIP": (CLIP, "text_model.", lambda: transformers.CLIPTextModelWithProjection(_CLIP)),
    "T5": (T5, "", lambda: transformers.T5EncoderModel(transformers.T5Config(**_T5))),
    "T5 1.1": (
        T5,
        "",
        lambda: transformers.T5EncoderModel(transformers.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    ),
    "UMT5": (T5, "", lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**_T5))),
    **{name: (DECODER, "", _decoder(name)) for name in ("Llama", "Qwen2", "Qwen3", "Gemma2")},
}


def _modules(name: str) -> list[str]:
    _, inside, build = ENCODERS[name]
    with torch.device("meta"):
        model = build()
    return [
        path.removeprefix(inside)
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(False))
    ]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_module_is_found_once(name: str) -> None:
    table = ENCODERS[name][0]
    for path in _modules(name):
        found = table.find(path)
        assert table.find(flat(path)) == found
        assert [naming for naming, _ in found] == ["diffusers"], path
        assert found[0][1].path("diffusers") == path


@pytest.mark.parametrize("table", [CLIP, T5, DECODER], ids=["CLIP", "T5", "decoder"])
def test_no_rule_is_for_a_module_that_no_encoder_has(table: ModuleTable) -> None:
    paths = [path for name, (other, _, _) in ENCODERS.items() if other is table for path in _modules(name)]
    used = {(site.rule, site.part) for path in paths for _, site in table.find(path)}
    assert used == {
        (rule, number if len(rule.diffusers) > 1 else None)
        for rule in table.rules
        for number in range(len(rule.diffusers))
    }


def test_openclip_checkpoint_converts_to_what_the_table_says() -> None:
    model = transformers.CLIPTextModelWithProjection(_CLIP)
    expected = model.state_dict()
    published: dict[str, torch.Tensor] = {"text_projection": expected["text_projection.weight"].T}
    for path in _modules("CLIP"):
        site = CLIP.find(path)[0][1]
        if site.part not in (None, 0) or site.rule.native is None:
            continue
        native = site.rule.native.format(*site.indices)
        parts = [part.format(*site.indices) for part in site.rule.diffusers]
        for name, _ in model.text_model.get_submodule(path).named_parameters():
            joint = "" if native == "positional_embedding" else "_" if native.endswith("in_proj") else "."
            key = native + joint + name if joint else native
            published[key] = torch.cat([expected[f"text_model.{part}.{name}"] for part in parts])
    prefix = "conditioner.embedders.1.model."
    converted = convert_open_clip_checkpoint(
        model, {prefix + key: value for key, value in published.items()}, prefix
    )
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_lead_to_one_encoder(family: str) -> None:
    encoders = FAMILIES[family].text_encoders
    assert list(encoders) == ["te1", "te2", "te3"][: len(encoders)]
    for dialect in ("kohya", "diffusers", "comfy"):
        prefixes = [getattr(encoder, dialect) for encoder in encoders.values()]
        assert all(prefix.endswith("_" if dialect == "kohya" else ".") for prefix in prefixes)
        assert len(set(prefixes)) == len(prefixes)
    for encoder in encoders.values():
        assert all(encoder.table.find(path) for path in encoder.beside)
