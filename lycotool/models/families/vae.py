"""The VAE of Stable Diffusion 1, 2, XL and 3 and of Flux: LDM's names against diffusers'.

Both count the encoder's levels from the image. The decoder's levels LDM counts from the image
too, diffusers from the latent, so a table is for one number of levels; published ones have four.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial

from lycotool.models.families.rules import renamed, same, under
from lycotool.models.families.table import ModuleTable, Rule

#: Levels of every published VAE of this kind.
PUBLISHED_LEVELS = 4

#: Endings of native paths that are 1x1 convolutions in LDM and linear layers in diffusers.
POINTWISE = (".attn_1.q", ".attn_1.k", ".attn_1.v", ".attn_1.proj_out")

_RESNET = (
    *same("norm1", "conv1", "norm2", "conv2"),
    # Only where the number of channels changes.
    *renamed({"nin_shortcut": "conv_shortcut"}),
)

_ATTENTION = renamed({"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"})

#: What diffusers called the attention's layers before 0.17, as in ``stabilityai/sd-vae-ft-mse``.
_EARLIER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EARLIER = re.compile(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\..*)?")

_LEVEL = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.")


def vae_rules(levels: int) -> Iterator[Rule]:
    """The rules of a VAE with so many levels; the index counts the resnets of a level."""
    yield from same("quant_conv", "post_quant_conv")
    for side in ("encoder.", "decoder."):
        yield from under(side, side, _ends())
    for level in range(levels):
        down, up = f"encoder.down.{level}.", f"decoder.up.{level}."
        down_blocks = f"encoder.down_blocks.{level}."
        up_blocks = f"decoder.up_blocks.{levels - 1 - level}."
        yield from under(down + "block.{}.", down_blocks + "resnets.{}.", _RESNET)
        yield from under(up + "block.{}.", up_blocks + "resnets.{}.", _RESNET)
        if level < levels - 1:
            yield Rule(down + "downsample.conv", (down_blocks + "downsamplers.0.conv",))
        if level > 0:
            yield Rule(up + "upsample.conv", (up_blocks + "upsamplers.0.conv",))


def _ends() -> Iterator[Rule]:
    yield from same("conv_in", "conv_out")
    yield from renamed({"norm_out": "conv_norm_out"})
    yield from under("mid.attn_1.", "mid_block.attentions.0.", _ATTENTION)
    for number in (0, 1):
        yield from under(f"mid.block_{number + 1}.", f"mid_block.resnets.{number}.", _RESNET)


@lru_cache
def vae_table(levels: int = PUBLISHED_LEVELS) -> ModuleTable:
    """The modules of a VAE with so many levels."""
    return ModuleTable(partial(vae_rules, levels))


def levels_of(paths: Iterable[str]) -> int:
    """How many levels the VAE with these paths or keys has, in either naming; 0 for none."""
    return max((int(match[1]) + 1 for path in paths if (match := _LEVEL.match(path))), default=0)


def current_name(path: str) -> str:
    """A path or key in diffusers' naming with what the attention's layers are called now."""
    match = _EARLIER.fullmatch(path)
    return path if match is None else match[1] + _EARLIER_ATTENTION[match[2]] + (match[3] or "")
