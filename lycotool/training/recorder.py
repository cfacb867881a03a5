"""Losses stay on the device until it is time to look at them: reading one waits for the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.training.observe import StepRecord

if TYPE_CHECKING:
    from torch import Tensor

#: Decay of the smoothed loss.
_SMOOTHING = 0.98


@dataclass(frozen=True, slots=True)
class _Pending:
    step: int
    epoch: int
    loss: Tensor
    norm: Tensor
    lr: Mapping[str, float]
    images: int


class Recorder:
    """Collects what steps gave, and turns it into records.

    Parameters
    ----------
    every
        Steps between two looks.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self._device = device
        self._every = every
        self._pending: list[_Pending] = []
        self._average = 0.0
        self._weight = 0.0
        self._since = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether enough steps wait to be looked at."""
        return len(self._pending) >= self._every

    def add(
        self, *, step: int, epoch: int, loss: Tensor, norm: Tensor, lr: Mapping[str, float], images: int
    ) -> None:
        """Note a step; ``step`` and ``epoch`` count from 0."""
        self._pending.append(_Pending(step, epoch, loss, norm, dict(lr), images))

    def fetch(self) -> list[StepRecord]:
        """The records of the steps since the last time; waits for the device."""
        if not self._pending:
            return []
        both = [torch.stack([p.loss for p in self._pending]), torch.stack([p.norm for p in self._pending])]
        losses, norms = torch.stack(both).tolist()
        now = time.perf_counter()
        rate = sum(p.images for p in self._pending) / max(now - self._since, 1e-9)
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        records = []
        for pending, loss, norm in zip(self._pending, losses, norms, strict=True):
            if loss == loss:
                self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
                self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
            smoothed = self._average / self._weight if self._weight else loss
            records.append(
                StepRecord(pending.step + 1, pending.epoch + 1, loss, smoothed, norm, pending.lr, rate, peak)
            )
        self._pending.clear()
        self._since = time.perf_counter()
        return records

    def state(self) -> dict[str, float]:
        """What a resumed run goes on with."""
        return {"average": self._average, "weight": self._weight}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take up what :meth:`state` gave."""
        self._average, self._weight = state["average"], state["weight"]
