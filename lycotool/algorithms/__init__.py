"""The registry: one file per algorithm, one entry each; see :mod:`lycotool.algorithms.base`.

To add an algorithm, write its file and put its value into :data:`ALGORITHMS`. Detection,
the rules of `merge`, `inspect`'s tables and the conformance tests follow from it.
"""

from __future__ import annotations

from lycotool.algorithms import dora
from lycotool.algorithms.base import Algorithm
from lycotool.algorithms.boft import BOFT
from lycotool.algorithms.dylora import DYLORA
from lycotool.algorithms.full import FULL
from lycotool.algorithms.glora import GLORA
from lycotool.algorithms.ia3 import IA3
from lycotool.algorithms.loha import LOHA
from lycotool.algorithms.lokr import LOKR
from lycotool.algorithms.lora import LORA
from lycotool.algorithms.norm import NORM
from lycotool.algorithms.oft import DIAG_OFT
from lycotool.algorithms.tlora import TLORA

__all__ = ["ALGORITHMS", "BY_METADATA", "SLOT_NAMES"]

ALGORITHMS: tuple[Algorithm, ...] = (
    LORA, LOHA, LOKR, IA3, DYLORA, FULL, NORM, GLORA, DIAG_OFT, BOFT, TLORA,
)  # fmt: skip

#: Told apart from LoRA by metadata only, because its keys are LoRA's.
BY_METADATA = {"dylora": DYLORA}

#: Every tensor suffix the registry knows.
SLOT_NAMES: frozenset[str] = frozenset(
    {slot.name for algorithm in ALGORITHMS for layout in algorithm.layouts for slot in layout.slots}
    | {slot.name for slot in dora.SLOTS}
)
