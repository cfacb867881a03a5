"""Which batches each optimizer step trains: a function of seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lycotool.errors import UsageError
from lycotool.training.data.batches import plan_epoch
from lycotool.training.data.dataset import Batch, Dataset
from lycotool.training.options import DEFAULT_STEPS, LengthOptions


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step.

    Attributes
    ----------
    step, epoch
        Counted from 0.
    batches
        Trained one after the other; their gradients are averaged over all their samples.
    ends_epoch
        Whether the epoch is over after it.
    """

    step: int
    epoch: int
    batches: tuple[Batch, ...]
    ends_epoch: bool

    @property
    def samples(self) -> int:
        """Images of all batches."""
        return sum(len(batch.samples) for batch in self.batches)


class Plan:
    """All steps of a run.

    An epoch is cut into steps of ``gradient_accumulation_steps`` batches; its last step may have
    fewer, as in sd-scripts.

    Parameters
    ----------
    ranks
        Processes that share each batch, ``batch_size`` samples each.

    Raises
    ------
    UsageError
        If steps and epochs are both given.
    """

    def __init__(self, dataset: Dataset, length: LengthOptions, *, ranks: int = 1) -> None:
        if length.steps is not None and length.epochs is not None:
            raise UsageError("`--steps` and `--epochs` both say how long the run is", hint="give one")
        self.dataset = dataset
        self.ranks = ranks
        self.seed = length.seed
        self.accumulation = length.gradient_accumulation_steps
        self.batches_per_epoch = dataset.batches_per_epoch(ranks)
        self.steps_per_epoch = -(-self.batches_per_epoch // self.accumulation)
        if length.epochs is not None:
            self.steps = length.epochs * self.steps_per_epoch
        else:
            self.steps = length.steps or DEFAULT_STEPS
        self._of_epoch = lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def epochs(self) -> int:
        """Epochs the run touches; the last may be cut short."""
        return -(-self.steps // self.steps_per_epoch)

    def at(self, step: int) -> StepPlan:
        """What step ``step`` trains."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.accumulation
        batches = self._of_epoch(epoch)[start : start + self.accumulation]
        return StepPlan(step, epoch, batches, position == self.steps_per_epoch - 1)

    def _plan_epoch(self, epoch: int) -> tuple[Batch, ...]:
        return plan_epoch(self.dataset, seed=self.seed, epoch=epoch, ranks=self.ranks)
