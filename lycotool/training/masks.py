"""What a step drops, as masks: drawn outside the step from counters, read inside by address.

A run's masks are one flat tensor with a view for each use, so that a step costs one copy to
the device and a captured step reads the same memory again. Dropout of single elements is too
large for that; its mask is a hash of the element's number and the step's seed, computed on the
device and equal on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lycotool.training.randomness import numpy_generator

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: Purposes of the draws.
DROPOUT = "network dropout"
ELEMENTS = "network dropout elements"
BLOCKS = "dylora block"

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropouts:
    """What is dropped in training.

    Attributes
    ----------
    elements
        Of the change of the output, each by itself; what is kept grows so that the mean stays.
    ranks
        Of the ranks, or of the rows of ΔW where the algorithm has none.
    scale_ranks
        Whether what `ranks` keeps is divided by its share.
    modules
        The chance that the layer changes nothing.
    """

    elements: float = 0.0
    ranks: float = 0.0
    scale_ranks: bool = False
    modules: float = 0.0


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """One mask.

    Attributes
    ----------
    name
        ``live`` and ``held`` come together: the block of ranks that is trained, and those
        before it.
    rate
        The chance of an element to be dropped.
    is_scaled
        Whether what is kept is divided by its share.
    block
        Above 0: ranks are taken in blocks of this size.
    """

    name: str
    size: int
    rate: float = 0.0
    is_scaled: bool = False
    block: int = 0


def draw_masks(specs: Sequence[MaskSpec], seed: int, step: int) -> np.ndarray:
    """All masks of a step behind each other, float32."""
    import numpy as np

    uniform = numpy_generator(seed, DROPOUT, step, 0).random(sum(spec.size for spec in specs))
    blocks = numpy_generator(seed, BLOCKS, step, 0).random(len(specs))
    masks = np.empty(uniform.shape, dtype=np.float32)
    start = 0
    block = 0
    for index, spec in enumerate(specs):
        mask = masks[start : start + spec.size]
        if spec.block:
            if spec.name == "live":
                block = int(blocks[index] * (spec.size // spec.block))
            first, last = block * spec.block, (block + 1) * spec.block
            rank = np.arange(spec.size)
            mask[:] = (first <= rank) & (rank < last) if spec.name == "live" else rank < first
        else:
            mask[:] = uniform[start : start + spec.size] >= spec.rate
            if spec.is_scaled:
                mask /= max(float(mask.mean()), 1 / spec.size)
        start += spec.size
    return masks


def element_mask(like: Tensor, rate: float, seed: Tensor, salt: int) -> Tensor:
    """``1 / (1 - rate)`` where an element is kept and 0 where it is dropped.

    Parameters
    ----------
    like
        Gives shape, dtype and device.
    seed
        The step's, int64, on the device; read when the mask is used, so a captured step draws
        anew.
    salt
        The layer's.
    """
    number = torch.arange(like.numel(), device=like.device, dtype=torch.int64).reshape(like.shape)
    bits = _scramble(_scramble((number ^ seed) & _WORD) + (number >> 32) + (seed >> 32) + salt)
    kept = (bits >= int(rate * (_WORD + 1))).to(like.dtype)
    return kept / (1 - rate)


def _scramble(bits: Tensor) -> Tensor:
    """A permutation of 32-bit words whose bits all depend on all (C. Wellons' `lowbias32`)."""
    bits = bits & _WORD
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _WORD
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _WORD
    return bits ^ (bits >> 16)
