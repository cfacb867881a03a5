"""Learning-rate schedules: the factor of every optimizer step, as a function of the step alone.

Nothing is kept between steps, so a resumed run continues exactly. The formulas are those of
transformers' ``optimization.py`` (5.23) with the meanings sd-scripts gives to the numbers
(``get_scheduler_fix``): steps count optimizer steps, and one cycle of ``cosine_with_min_lr`` and
``warmup_stable_decay`` is half a cosine wave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lycotool.errors import UsageError

ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "inverse_sqrt",
    "piecewise_constant",
]

#: Schedules that do not depend on how long the training is, if the warm-up is a step number.
ENDLESS = frozenset({"constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant"})

#: Where polynomial decay ends; the learning rate itself, as in transformers.
_POLYNOMIAL_END = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule with all its numbers, in optimizer steps.

    Parameters
    ----------
    total
        Steps of the training.
    warmup, decay
        Steps the factor rises from 0 at the start, and falls at the end (the latter for
        ``warmup_stable_decay``).
    cycles, power, min_ratio, timescale
        Restarts of the cosine, the exponent of ``polynomial``, the smallest factor, and the steps in
        which ``inverse_sqrt`` falls by √2 at first (None: the warm-up, or 10 000 without one).
    rules
        Of ``piecewise_constant``: ``1:10,0.1:20,0.01`` multiplies by 1 before step 10, by 0.1 before
        step 20, and by 0.01 from there.
    """

    name: ScheduleName
    total: int
    warmup: int = 0
    decay: int = 0
    cycles: int = 1
    power: float = 1.0
    min_ratio: float = 0.0
    timescale: int | None = None
    rules: str = ""

    def factor(self, step: int, lr: float = 1.0) -> float:
        """What multiplies the learning rate of optimizer step ``step``, counted from 0.

        Parameters
        ----------
        lr
            The learning rate itself, which ``polynomial`` alone needs: it ends at 1e-7.
        """
        if self.name == "piecewise_constant":
            return _piecewise(self.rules, step)
        if step < self.warmup:
            rise = step / self.warmup
            if self.name == "warmup_stable_decay":
                return rise * (1 - self.min_ratio) + self.min_ratio
            return rise
        if self.name in ("constant", "constant_with_warmup"):
            return 1.0
        if self.name == "inverse_sqrt":
            timescale = self.timescale or self.warmup or 10_000
            return 1.0 / math.sqrt((step + timescale - self.warmup) / timescale)
        if self.name == "warmup_stable_decay":
            return self._stable_decay(step)
        if self.name == "linear":
            return max(0.0, (self.total - step) / max(1, self.total - self.warmup))
        if self.name == "polynomial":
            return self._polynomial(step, lr)
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.name == "cosine_with_restarts":
            if progress >= 1.0:
                return 0.0
            return max(0.0, _cosine(math.pi * ((self.cycles * progress) % 1.0)))
        if self.name == "cosine":
            return max(0.0, _cosine(math.pi * progress))
        wave = _cosine(math.pi * self.cycles * progress)
        return max(0.0, wave * (1 - self.min_ratio) + self.min_ratio)

    def _polynomial(self, step: int, lr: float) -> float:
        if lr <= _POLYNOMIAL_END:
            return 1.0
        if step > self.total:
            return _POLYNOMIAL_END / lr
        remaining: float = 1 - (step - self.warmup) / max(1, self.total - self.warmup)
        share: float = remaining**self.power
        return ((lr - _POLYNOMIAL_END) * share + _POLYNOMIAL_END) / lr

    def _stable_decay(self, step: int) -> float:
        stable = self.total - self.warmup - self.decay
        if step < self.warmup + stable:
            return 1.0
        if step >= self.warmup + stable + self.decay:
            return self.min_ratio
        progress = (step - self.warmup - stable) / max(1, self.decay)
        wave = _cosine(math.pi * self.cycles * progress)
        return max(0.0, wave * (1 - self.min_ratio) + self.min_ratio)


def steps_of(value: float, total: int, *, option: str) -> int:
    """A number of steps: below 1 a share of the training, else steps.

    Raises
    ------
    UsageError
        If it is negative, no whole number, or longer than the training.
    """
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{option} is {value:g}, expected steps, or a share of the training below 1")
    if value < 1:
        return int(value * total)
    if value != int(value):
        raise UsageError(f"{option} is {value:g}: steps are whole numbers, shares are below 1")
    if value > total:
        raise UsageError(f"{option} is {value:g}, the training has {total} steps")
    return int(value)


def check_rules(rules: str) -> None:
    """Refuse rules of ``piecewise_constant`` that cannot be read.

    Raises
    ------
    UsageError
        With the shape they must have.
    """
    try:
        _piecewise(rules, 0)
    except ValueError:
        raise UsageError(
            f"--lr-rules: cannot read {rules!r}",
            hint="factor:step pairs and a last factor, such as `1:10,0.1:20,0.01`",
        ) from None


def _piecewise(rules: str, step: int) -> float:
    *pairs, last = rules.split(",")
    bounds = []
    for pair in pairs:
        factor, _, until = pair.partition(":")
        bounds.append((int(until), float(factor)))
    final = float(last)
    return next((factor for until, factor in sorted(bounds) if step < until), final)


def _cosine(angle: float) -> float:
    return 0.5 * (1.0 + math.cos(angle))
