"""What a run tells while it works, and to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, as it is shown and logged.

    Attributes
    ----------
    step
        Counted from 1: how many are done.
    epoch
        Counted from 1.
    loss, smoothed_loss
        Of this step, and averaged over about the last fifty.
    grad_norm
        Of all gradients, before clipping.
    lr
        By group of parameters.
    images_per_second
        Since the last record that was fetched.
    peak_bytes
        Most memory the GPU used so far; 0 without one.
    """

    step: int
    epoch: int
    loss: float
    smoothed_loss: float
    grad_norm: float
    lr: Mapping[str, float]
    images_per_second: float
    peak_bytes: int


class Observer:
    """Told what happens; this one ignores it."""

    def start(self, label: str, total: int) -> None:
        """A phase of ``total`` pieces begins, such as caching."""

    def advance(self, count: int) -> None:
        """So many pieces more are done."""

    def note(self, text: str) -> None:
        """Something to say."""

    def warning(self, text: str) -> None:
        """Something to warn of."""

    def planned(self, plan: object) -> None:
        """What will be done, before it is: the command's own description."""

    def begin(self, first_step: int, steps: int) -> None:
        """Training begins after ``first_step`` of ``steps`` steps."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def validated(self, step: int, loss: float) -> None:
        """The validation loss after a step."""

    def sampled(self, step: int, paths: Sequence[str]) -> None:
        """Images were made after a step; the last path is the grid of all."""

    def saved(self, step: int, path: str) -> None:
        """The adapter was written after a step."""

    def close(self) -> None:
        """The run is over, whatever came of it."""


class Observers(Observer):
    """Tells several."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def start(self, label: str, total: int) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.start(label, total)

    def advance(self, count: int) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.advance(count)

    def note(self, text: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.note(text)

    def warning(self, text: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.warning(text)

    def begin(self, first_step: int, steps: int) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.begin(first_step, steps)

    def step(self, record: StepRecord) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.step(record)

    def validated(self, step: int, loss: float) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.validated(step, loss)

    def sampled(self, step: int, paths: Sequence[str]) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.sampled(step, paths)

    def saved(self, step: int, path: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.saved(step, path)

    def close(self) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.close()
