"""Loss scaling for fp16: keeps small gradients of half-precision activations above zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.training.optimizers.stepper import Stepper

#: As torch.amp.GradScaler: start, and change after an overflow and after so many steps without.
_START, _BACKOFF, _GROWTH, _INTERVAL = 65536.0, 0.5, 2.0, 2000

#: Below this the numbers themselves must be wrong.
SMALLEST = 2.0**-10


class LossScale:
    """A factor on the loss, adapted to the largest that does not overflow.

    Micikevicius et al. 2018, "Mixed Precision Training", section 3.2. With ``enabled`` false
    the factor is 1 and nothing waits for the device.
    """

    def __init__(self, *, enabled: bool, device: torch.device | str = "cpu") -> None:
        self.enabled = enabled
        self._factor = torch.tensor(_START if enabled else 1.0, device=device)
        self.factor = float(self._factor)
        self._clean = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate. Reads the factor from memory that stays, for a recorded step."""
        return loss * self._factor if self.enabled else loss

    def unscale(self, stepper: Stepper) -> tuple[Tensor, bool]:
        """Divide the gradients again. Gives their norm, and whether the step may be taken."""
        if not self.enabled:
            return stepper.norm(), True
        for gradient in stepper.gradients:
            gradient.div_(self.factor)
        norm = stepper.norm()
        if bool(norm.isfinite()):
            self._clean += 1
            if self._clean >= _INTERVAL:
                self._set(self.factor * _GROWTH)
            return norm, True
        self._set(self.factor * _BACKOFF)
        return norm, False

    def _set(self, factor: float, clean: int = 0) -> None:
        self.factor, self._clean = factor, clean
        self._factor.fill_(factor)

    def state(self) -> dict[str, float]:
        """What a resumed run goes on with."""
        return {"factor": self.factor, "clean": self._clean}

    def load_state(self, state: dict[str, float]) -> None:
        """Take up what :meth:`state` gave."""
        self._set(state["factor"], int(state["clean"]))
