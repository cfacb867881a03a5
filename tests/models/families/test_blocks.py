"""The labels of layer-block weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lycotool.models.families import FAMILIES
from lycotool.models.families.base import Family
from lycotool.models.families.table import Site


def _sites(family: Family, depth: int) -> Iterator[Site]:
    for rule in family.unet.rules:
        for index in range(depth):
            yield Site(rule, (index,) * (rule.native or "").count("{}"), None)


def _labels(name: str) -> list[str]:
    family = FAMILIES[name]
    depth = {"flux1": 38}.get(name, 1)
    labels = (family.block(site) for site in _sites(family, depth))
    return sorted({label for label in labels if label is not None})


def test_labels_of_blocks() -> None:
    """With BASE, these are the 26 and 20 of sd-webui-lora-block-weight."""
    ins, outs = [f"IN{number:02d}" for number in range(12)], [f"OUT{number:02d}" for number in range(12)]
    for name, count in (("sd1", 12), ("sd2", 12), ("sdxl", 9)):
        assert _labels(name) == [*ins[:count], "M00", *outs[:count]]
    assert {"D18", "S37", "IN", "OUT"} < set(_labels("flux1"))
    assert len([label for label in _labels("flux1") if label[0] == "S"]) == 38


@pytest.mark.parametrize(
    ("name", "path", "label"),
    [
        ("sd1", "time_embedding.linear_1", None),
        ("sd1", "conv_in", "IN00"),
        ("sd1", "conv_out", None),
        ("sd1", "down_blocks.1.downsamplers.0.conv", "IN06"),
        ("sd1", "up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("sd1", "mid_block.attentions.0.proj_in", "M00"),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q", "IN08"),
        ("flux1", "transformer_blocks.18.attn.add_k_proj", "D18"),
        ("flux1", "single_transformer_blocks.37.proj_mlp", "S37"),
        ("flux1", "time_text_embed.guidance_embedder.linear_1", "IN"),
        ("flux1", "norm_out.linear", "OUT"),
        ("wan", "blocks.39.attn2.add_k_proj", "B39"),
        ("z-image", "layers.29.attention.to_q", "B29"),
        ("lumina2", "context_refiner.1.attn.to_v", "C01"),
        ("anima", "text_conditioner.blocks.5.mlp.0", "A05"),
    ],
)
def test_block_of_a_module(name: str, path: str, label: str | None) -> None:
    (_, site), *_ = FAMILIES[name].unet.find(path)
    assert FAMILIES[name].block(site) == label
