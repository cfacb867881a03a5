"""Prodigy: Adam that finds its own step size.

Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner",
algorithm 4, with the options and defaults of prodigyopt 1.1.2. Numbers stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lycotool.lazy import torch


class Prodigy(torch.optim.Optimizer):
    """Distance ``d`` to the solution is estimated from gradients; the step is Adam's at lr ``d·lr``.

    Parameters
    ----------
    lr
        A factor on the step found; 1 is meant. All groups share it, or have 0.
    beta3
        Decay of the estimate's averages; None is ``√β₂``.
    decouple
        Weight decay as in AdamW instead of as a penalty.
    safeguard_warmup
        Leave the learning rate out of the estimate's denominator.
    d0, d_coef, growth_rate
        First estimate, factor on it, and how fast it may grow in one step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "beta3": math.sqrt(betas[1]) if beta3 is None else beta3, "eps": eps,
            "weight_decay": weight_decay, "decouple": decouple, "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup, "d0": d0, "d_coef": d_coef, "growth_rate": growth_rate,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; a step without any gradient so far leaves everything as it is."""
        shared = self._shared()
        first = self.param_groups[0]
        beta1, beta2 = first["betas"]
        lr = max(float(group["lr"]) for group in self.param_groups)
        count, d, d0 = shared["count"], shared["d"], first["d0"]
        step_size = d * lr
        if first["use_bias_correction"]:
            step_size = step_size * (1 - beta2 ** (count + 1)).sqrt() / (1 - beta1 ** (count + 1))
        numerator = shared["numerator"] * first["beta3"]
        denominator = torch.zeros_like(d)
        for group, parameter, gradient in self._moving():
            state = self._state_of(parameter)
            if group["weight_decay"] and not group["decouple"]:
                gradient.add_(parameter, alpha=group["weight_decay"])
            distance = torch.sum(gradient * (state["start"] - parameter))
            numerator = numerator + (d / d0) * step_size * distance
            state["exp_avg"].mul_(beta1).add_(d * (1 - beta1) * gradient)
            state["exp_avg_sq"].mul_(beta2).add_(d * d * (1 - beta2) * gradient * gradient)
            weight = d if group["safeguard_warmup"] else step_size
            state["slope"].mul_(group["beta3"]).add_((d / d0) * weight * gradient)
            denominator = denominator + state["slope"].abs().sum()
        moved = denominator > 0
        found = first["d_coef"] * numerator / torch.where(moved, denominator, 1.0)
        d_new = torch.where(d == d0, torch.maximum(d, found), d)
        largest = torch.maximum(shared["d_max"], found)
        d_new = torch.minimum(largest, d_new * first["growth_rate"])
        d_new = torch.where(moved, d_new, d) if lr > 0 else d
        for group, parameter, _ in self._moving():
            state = self.state[parameter]
            if group["weight_decay"] and group["decouple"]:
                parameter.mul_(1 - group["weight_decay"] * step_size * moved)
            change = step_size * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + d_new * group["eps"])
            parameter.sub_(torch.where(moved, change, 0.0))
        shared["d_max"].copy_(torch.where(moved, largest, shared["d_max"]))
        shared["numerator"].copy_(torch.where(moved, numerator, shared["numerator"]))
        shared["count"].add_(moved)
        shared["d"].copy_(d_new)

    def _moving(self) -> Iterable[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and float(group["lr"]) > 0:
                    yield group, parameter, parameter.grad

    def _shared(self) -> dict[str, torch.Tensor]:
        """What all groups have in common: kept with the first parameter, so that it is saved."""
        first = self.param_groups[0]["params"][0]
        state: dict[str, torch.Tensor] = self.state[first]
        if "d" not in state:
            d0 = torch.full((), float(self.param_groups[0]["d0"]), dtype=first.dtype, device=first.device)
            zero = torch.zeros_like(d0)
            state |= {"d": d0.clone(), "d_max": d0.clone(), "numerator": zero.clone(), "count": zero.clone()}
        return state

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if "start" not in state:
            state["start"] = parameter.clone()
            for name in ("exp_avg", "exp_avg_sq", "slope"):
                state[name] = torch.zeros_like(parameter)
        return state
