"""What happens between steps: validation, images, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lycotool.lazy import torch
from lycotool.training.bases.residence import visiting
from lycotool.training.loop import Run, state_of
from lycotool.training.observe import Observer
from lycotool.training.output_options import SampleOptions, SaveOptions, ValidationOptions
from lycotool.training.plan import StepPlan
from lycotool.training.samples import ImageMaker
from lycotool.training.saves import Saver
from lycotool.training.state import State, remove_state, write_state
from lycotool.training.validation import Validation


class Between:
    """Does what is due after a step. Of several processes all validate, and one writes.

    Parameters
    ----------
    validation, images
        None where there is nothing to validate on, or no prompts.
    identity
        What a state must agree with to be resumed.
    """

    def __init__(
        self,
        run: Run,
        observer: Observer,
        saver: Saver,
        *,
        save: SaveOptions,
        when_validated: ValidationOptions,
        when_sampled: SampleOptions,
        validation: Validation | None,
        images: ImageMaker | None,
        state_folder: Path,
        identity: dict[str, Any],
    ) -> None:
        self._run = run
        self._observer = observer
        self._saver = saver
        self._save = save
        self._validation = validation
        self._images = images
        self._validated = when_validated
        self._sampled = when_sampled
        self._state_folder = state_folder
        self._identity = identity
        self._writes = run.world.is_main
        self.validation_loss: float | None = None
        self.outputs: list[str] = []

    def before(self) -> None:
        """Images of the base model, if asked for."""
        if self._images is not None and self._sampled.sample_at_first:
            self._sample(0)

    def is_due(self, planned: StepPlan) -> bool:
        """Whether anything is due after this step."""
        return (
            self._is_last(planned)
            or self._validates(planned)
            or self._samples(planned)
            or self._saves(planned)
        )

    def after(self, planned: StepPlan) -> None:
        """Validate, make images, save."""
        done, epoch = planned.step + 1, planned.epoch + 1
        if self._validates(planned) and self._validation is not None:
            with evaluating(self._run):
                self.validation_loss = self._validation.loss(self._run)
            self._observer.validated(done, self.validation_loss)
        if self._samples(planned):
            self._sample(done)
        if self._is_last(planned):
            self.outputs = self._write(done, epoch, final=True)
            if self._save.save_state_on_train_end:
                self._write_state(done)
            elif self._save.save_state and self._writes:
                remove_state(self._state_folder)
        elif self._saves(planned):
            self._write(done, epoch, ends_epoch=self._saves_epoch(planned))
            if self._save.save_state:
                self._write_state(done)

    def interrupted(self, done: int) -> None:
        """Save the adapter as it is, and the state to go on from."""
        self._write(done, self._run.plan.at(done - 1).epoch + 1)
        if self._save.save_state:
            self._write_state(done)
            self._observer.note(
                f"stopped after step {done}; the same command goes on from {self._state_folder}"
            )

    def _is_last(self, planned: StepPlan) -> bool:
        return planned.step + 1 == self._run.plan.steps

    def _validates(self, planned: StepPlan) -> bool:
        if self._validation is None:
            return False
        steps, epochs = self._validated.validate_every_n_steps, self._validated.validate_every_n_epochs
        if steps is None and epochs is None:
            epochs = 1
        return self._is_last(planned) or _every(planned, steps, epochs)

    def _samples(self, planned: StepPlan) -> bool:
        if self._images is None:
            return False
        return _every(planned, self._sampled.sample_every_n_steps, self._sampled.sample_every_n_epochs)

    def _saves(self, planned: StepPlan) -> bool:
        return _every(planned, self._save.save_every_n_steps, self._save.save_every_n_epochs)

    def _saves_epoch(self, planned: StepPlan) -> bool:
        return _every(planned, None, self._save.save_every_n_epochs)

    def _sample(self, done: int) -> None:
        assert self._images is not None
        if not self._writes:
            return
        with evaluating(self._run):
            paths = self._images.make(done)
        self._observer.sampled(done, [str(path) for path in paths])

    def _write(self, done: int, epoch: int, *, final: bool = False, ends_epoch: bool = False) -> list[str]:
        if not self._writes:
            return []
        with evaluating(self._run):
            if final:
                paths = self._saver.final(done, epoch)
            else:
                paths = self._saver.between(done, epoch, ends_epoch=ends_epoch)
        for path in paths:
            self._observer.saved(done, path)
        return paths

    def _write_state(self, done: int) -> None:
        tensors, rest = state_of(self._run)  # in all processes, which may each have a part of it
        if not self._writes:
            return
        rest |= {"identity": self._identity, "saves": self._saver.written}
        write_state(self._state_folder, State(done, tensors, rest))


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """The network without dropouts, DyLoRA whole; the averaged parameters of schedule-free optimizers."""
    run.stepper.train_mode(False)
    run.network.eval()
    try:
        with torch.no_grad(), visiting(run.base):
            yield
    finally:
        run.network.train()
        run.stepper.train_mode(True)


def _every(planned: StepPlan, steps: int | None, epochs: int | None) -> bool:
    by_step = steps is not None and (planned.step + 1) % steps == 0
    return by_step or (epochs is not None and planned.ends_epoch and (planned.epoch + 1) % epochs == 0)
