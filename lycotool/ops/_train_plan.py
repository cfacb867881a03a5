"""What a training will do, before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lycotool.training.memory.choice import MemoryChoice
    from lycotool.training.memory.estimate import MemoryEstimate
    from lycotool.training.setup import Trainable
    from lycotool.training.targets import TableRow


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run will do; all that a dry run gives.

    Attributes
    ----------
    family
        ``sd1``, ``sd2`` or ``sdxl``.
    modules
        The module type table.
    processes
        That train together, each on a GPU of its own.
    batch_sizes
        Images of a batch in all processes together, of each part of the data set.
    lrs
        Learning rate by component.
    memory, available
        Bytes that a GPU will hold, estimated, and what it can hold. A run on another device is
        estimated by a dry run only.
    memory_reason
        Why gradient checkpointing is on or off, where the options left it open.
    """

    output: str
    family: str
    prediction: str
    precision: str
    device: str
    modules: tuple[TableRow, ...]
    parameters: int
    images: int
    batches_per_epoch: int
    steps: int
    epochs: int
    seed: int
    processes: int
    batch_sizes: tuple[int, ...]
    lrs: Mapping[str, float]
    gradient_checkpointing: bool
    memory: MemoryEstimate | None
    available: int | None
    memory_reason: str
    dataset: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_of(ready: Trainable, choice: MemoryChoice | None, output: str) -> TrainPlan:
    """Of a network that is attached to its base; ``choice`` where memory was estimated."""
    from lycotool.training.setup import warnings_of

    table = ready.network.table()
    return TrainPlan(
        output=output,
        family=ready.base.family,
        prediction=ready.base.prediction,
        precision=ready.options.compute.precision,
        device=str(ready.device),
        modules=table,
        parameters=sum(row.parameters for row in table),
        images=ready.dataset.images_per_epoch,
        batches_per_epoch=ready.plan.batches_per_epoch,
        steps=ready.plan.steps,
        epochs=ready.plan.epochs,
        seed=ready.options.length.seed,
        processes=ready.world.size,
        batch_sizes=_batch_sizes(ready),
        lrs=ready.lrs,
        gradient_checkpointing=bool(ready.options.compute.gradient_checkpointing),
        memory=None if choice is None else choice.estimate,
        available=None if choice is None else choice.available,
        memory_reason="" if choice is None else choice.reason,
        dataset=ready.dataset.describe(ready.world.size),
        warnings=(*warnings_of(ready), *([choice.warning] if choice is not None and choice.warning else [])),
    )


def _batch_sizes(ready: Trainable) -> tuple[int, ...]:
    groups = sorted({subset.group for subset in ready.dataset.subsets})
    return tuple(ready.dataset.batch_size_of(group) * ready.world.size for group in groups)
