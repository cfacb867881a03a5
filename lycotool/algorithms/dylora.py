"""DyLoRA: LoRA trained at every rank up to its own, so that any first rows work alone.

``ΔW = c · up @ down`` as LoRA. Its file has LoRA's keys, so it is told apart by metadata
(``networks.dylora``, or ``algo=dylora``) only. sd-scripts trains with ``alpha / rank``;
LyCORIS with ``alpha / (rank / block_size)``, which ``Reading.dylora_block_size`` reproduces.
lycotool trains each block of ranks with the ``alpha / rank`` of the whole file, so that the
file, and every slice of it with the same scale, is what was trained.
[DyLoRA, arXiv 2210.07558]
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.algorithms.base import Rule
from lycotool.algorithms.lora import LORA, PLAIN
from lycotool.algorithms.training import (
    LORA_PLUS_ARGUMENTS,
    RANK_ARGUMENTS,
    Arguments,
    CannotTrainError,
    Start,
    Training,
    low_rank_form,
)

if TYPE_CHECKING:
    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.lazy import torch


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """As LoRA; the rank must be a multiple of the block size."""
    if arguments.rank % arguments.block_size:
        raise CannotTrainError(f"dim {arguments.rank} is not a multiple of block_size {arguments.block_size}")
    return lora.init(layer, arguments, generator)


DYLORA = replace(
    LORA,
    name="dylora",
    title="DyLoRA (LoRA that works at every rank)",
    citation="DyLoRA, arXiv 2210.07558",
    layouts=(PLAIN,),
    allows_dora=False,
    merge=Rule(True, "its file is a LoRA"),
    resize=Rule(True, "by slicing at multiples of the unit, or by truncated SVD"),
    resize_conv_cp=None,
    training=Training(
        arguments=(RANK_ARGUMENTS | LORA_PLUS_ARGUMENTS | {"block_size"}) - {"rs_lora", "use_scalar"},
        init=init,
        layouts=(PLAIN,),
        learning_rate=2e-4,
        structured=low_rank_form(lora.factors, lora.cost),
        up=frozenset({"lora_up.weight"}),
        rank_axes=(("lora_up.weight", 1),),
        nested_axes=(("lora_up.weight", 1), ("lora_down.weight", 0)),
    ),
    advice=(),
)
