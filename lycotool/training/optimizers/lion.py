"""Lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lycotool.lazy import torch


class Lion(torch.optim.Optimizer):
    """``w ← w·(1 - lr·λ) - lr·sign(β₁·m + (1 - β₁)·g)``, then ``m ← β₂·m + (1 - β₂)·g``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = torch.lerp(gradient, average, beta1).sign_()
                parameter.sub_(group["lr"] * direction)
                average.lerp_(gradient, 1 - beta2)
