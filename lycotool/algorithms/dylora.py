"""DyLoRA: LoRA trained at every rank up to its own, so that any first rows work alone.

``ΔW = c · up @ down`` as LoRA. Its file has LoRA's keys, so it is told apart by metadata
(``networks.dylora``, or ``algo=dylora``) only. sd-scripts trains with ``alpha / rank``;
LyCORIS with ``alpha / (rank / block_size)``, which ``Reading.dylora_block_size`` reproduces.
[DyLoRA, arXiv 2210.07558]
"""

from __future__ import annotations

from dataclasses import replace

from lycotool.algorithms.base import Rule
from lycotool.algorithms.lora import LORA, PLAIN

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
    advice="",
)
