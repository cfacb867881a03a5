"""Whether to use gradient checkpointing, from what a run takes and what is free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lycotool.training.memory.available import available_memory
from lycotool.training.memory.estimate import MemoryEstimate, estimate_memory
from lycotool.training.options import TrainOptions
from lycotool.training.setup import Trainable

#: Memory that lies between tensors and holds none: what a run takes beyond the sum of its tensors.
FRAGMENTATION = 1.06

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What was chosen, and why.

    Attributes
    ----------
    ready
        The training, its options decided.
    estimate
        Of what was chosen.
    available
        Bytes of the device; None where nobody knows.
    reason
        A sentence; empty where there was nothing to choose.
    warning
        What will probably not fit, else empty.
    """

    ready: Trainable
    estimate: MemoryEstimate
    available: int | None
    reason: str = ""
    warning: str = ""


def choose_memory(ready: Trainable, *, available: int | None = None) -> MemoryChoice:
    """Decide ``gradient_checkpointing`` where the options leave it open.

    It is off where the run fits into the device without it, as it costs time: a second forward
    pass. On devices other than CUDA's it is off.

    Parameters
    ----------
    available
        Bytes to fit into; None asks the device.
    """
    available = available_memory(ready.device) if available is None else available
    asked = ready.options.compute.gradient_checkpointing
    reason = ""
    estimate = estimate_memory(ready, checkpoint=bool(asked))
    if asked is None and available is not None:
        without = estimate
        if not fits(without, available):
            estimate = estimate_memory(ready, checkpoint=True)
        is_on = estimate.gradient_checkpointing
        reason = (
            f"gradient checkpointing is {'on' if is_on else 'off'}: without it training takes about "
            f"{gibibytes(without.total)}, {gibibytes(available)} are free"
        )
    warning = ""
    if available is not None and not fits(estimate, available):
        warning = (
            f"training takes about {gibibytes(estimate.total)} of the GPU's memory, {gibibytes(available)} are free; "
            + remedies(ready.options, checkpointing=estimate.gradient_checkpointing)
        )
    compute = replace(ready.options.compute, gradient_checkpointing=estimate.gradient_checkpointing)
    return MemoryChoice(
        replace(ready, options=replace(ready.options, compute=compute)), estimate, available, reason, warning
    )


def fits(estimate: MemoryEstimate, available: int) -> bool:
    """Whether there is room, with what lies between tensors."""
    return estimate.total * FRAGMENTATION <= available


def remedies(options: TrainOptions, *, checkpointing: bool) -> str:
    """The options that make a run smaller, those that it does not use yet."""
    found = [] if checkpointing else ["`--gradient-checkpointing`"]
    if options.data.batch_size > 1:
        found.append("a smaller `--batch-size` (with `--gradient-accumulation-steps`)")
    if options.compute.base_dtype is None:
        found.append("`--base-dtype fp8`")
    found.append("a smaller `--resolution` or `--dim`")
    return f"{', '.join(found)} {'take' if len(found) > 1 else 'takes'} less"


def gibibytes(count: int) -> str:
    """A number of bytes as people read it."""
    return f"{count / _GIB:.1f} GiB"
