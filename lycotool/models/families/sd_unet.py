"""The UNet of Stable Diffusion 1, 2 and XL: SD's LDM and SGM numbers against diffusers'.

LDM numbers the blocks of a side through all levels, diffusers counts them in each level, so
the rules name every block and leave only the transformer block's index free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import Rule

#: Resnets of each level on the way down; there is one more on the way up.
PUBLISHED_RESNETS = 2

_RESNET = renamed(
    {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    }
)

#: Only where the number of channels changes.
_SHORTCUT = renamed({"skip_connection": "conv_shortcut"})


def unet_rules(
    widths: Sequence[int],
    attention: Sequence[bool],
    transformer_block: str,
    resnets: int = PUBLISHED_RESNETS,
) -> Iterator[Rule]:
    """The rules of a UNet.

    Parameters
    ----------
    widths
        Channels of each level, from the top.
    attention
        Whether each level, from the top, has attention.
    transformer_block
        Index of the transformer blocks of one attention: ``0`` where there is only one,
        ``{}`` where there are more.
    resnets
        Resnets of each level on the way down.
    """
    yield from _ends()
    inner = _attention(transformer_block)
    yield from _down(widths, attention, inner, resnets)
    yield from _middle(inner)
    yield from _up(len(widths), attention[::-1], inner, resnets + 1)


def _ends() -> Iterator[Rule]:
    yield from renamed(
        {
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "input_blocks.0.0": "conv_in",
            "out.0": "conv_norm_out",
            "out.2": "conv_out",
        }
    )


def _attention(transformer_block: str) -> tuple[Rule, ...]:
    block = (
        *(f"norm{number}" for number in (1, 2, 3)),
        *(
            f"{attention}.{name}"
            for attention in ("attn1", "attn2")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        ),
        "ff.net.0.proj",
        "ff.net.2",
    )
    return same(
        "norm",
        "proj_in",
        "proj_out",
        *(f"transformer_blocks.{transformer_block}.{module}" for module in block),
    )


def _down(
    widths: Sequence[int], attention: Sequence[bool], attention_rules: tuple[Rule, ...], resnets: int
) -> Iterator[Rule]:
    slots = resnets + 1  # LDM numbers the downsampler too, which the last level lacks
    for level, width in enumerate(widths):
        narrower = widths[max(level - 1, 0)]
        for number in range(resnets):
            block = f"input_blocks.{1 + slots * level + number}"
            resnet = _RESNET + _SHORTCUT if number == 0 and width != narrower else _RESNET
            yield from under(f"{block}.0.", f"down_blocks.{level}.resnets.{number}.", resnet)
            if attention[level]:
                yield from under(f"{block}.1.", f"down_blocks.{level}.attentions.{number}.", attention_rules)
        if level < len(widths) - 1:
            yield Rule(
                f"input_blocks.{slots * (level + 1)}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",)
            )


def _middle(attention_rules: tuple[Rule, ...]) -> Iterator[Rule]:
    yield from under("middle_block.0.", "mid_block.resnets.0.", _RESNET)
    yield from under("middle_block.1.", "mid_block.attentions.0.", attention_rules)
    yield from under("middle_block.2.", "mid_block.resnets.1.", _RESNET)


def _up(
    levels: int, attention: Sequence[bool], attention_rules: tuple[Rule, ...], resnets: int
) -> Iterator[Rule]:
    # Every resnet here reads what the way down left, so its channels change.
    for level in range(levels):
        for number in range(resnets):
            block = f"output_blocks.{resnets * level + number}"
            yield from under(f"{block}.0.", f"up_blocks.{level}.resnets.{number}.", _RESNET + _SHORTCUT)
            if attention[level]:
                yield from under(f"{block}.1.", f"up_blocks.{level}.attentions.{number}.", attention_rules)
        if level < levels - 1:
            position = 2 if attention[level] else 1
            last = resnets * (level + 1) - 1
            yield Rule(f"output_blocks.{last}.{position}.conv", (f"up_blocks.{level}.upsamplers.0.conv",))


#: The block names of sd-webui-lora-block-weight.
BLOCKS = (("input_blocks_{}_", "IN{:02d}"), ("middle_block_", "M00"), ("output_blocks_{}_", "OUT{:02d}"))
