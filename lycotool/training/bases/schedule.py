"""The noise schedule that Stable Diffusion was trained with."""

from __future__ import annotations

from collections.abc import Mapping

from lycotool.errors import IncompatibleError
from lycotool.lazy import torch

#: Every published Stable Diffusion 1, 2 and XL (sd-scripts ``train_network.py``: the same constants).
STEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012


def alphas_cumprod(
    *, kind: str = "scaled_linear", start: float = BETA_START, end: float = BETA_END, steps: int = STEPS
) -> torch.Tensor:
    """ᾱ_t = ∏_{s≤t} (1 − β_s), as float64 of shape ``(steps,)``.

    Parameters
    ----------
    kind
        ``scaled_linear``: √β is linear in t, as in LDM's ``make_beta_schedule``; ``linear``: β is.

    Raises
    ------
    IncompatibleError
        If the kind is another.
    """
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise IncompatibleError(f"the scheduler has the beta schedule {kind!r}", hint=_KINDS)
    return (1 - betas).cumprod(0)


_KINDS = "the known ones are 'scaled_linear' and 'linear'"


def with_zero_terminal_snr(alphas: torch.Tensor) -> torch.Tensor:
    """ᾱ moved and scaled so that the last step is pure noise and the first keeps its value.

    √ᾱ' = (√ᾱ − √ᾱ_T) · √ᾱ_1 / (√ᾱ_1 − √ᾱ_T), Lin et al. 2024, Algorithm 1
    (arXiv:2305.08891); in the dtype of ``alphas``, of shape ``(steps,)``.
    """
    root = alphas.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2


def from_scheduler_config(config: Mapping[str, object]) -> torch.Tensor:
    """ᾱ of the schedule in a diffusers folder, without the rescaling it may ask for.

    Raises
    ------
    IncompatibleError
        If the schedule is of an unknown kind or given as a list of betas.
    """
    if config.get("trained_betas") is not None:
        raise IncompatibleError("the scheduler's config lists its betas one by one", hint=_KINDS)
    numbers = {}
    for key, default in (("beta_start", BETA_START), ("beta_end", BETA_END), ("num_train_timesteps", STEPS)):
        value = config.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise IncompatibleError(f"the scheduler's config has {key} = {value!r}, expected a number > 0")
        numbers[key] = value
    return alphas_cumprod(
        kind=str(config.get("beta_schedule", "scaled_linear")),
        start=float(numbers["beta_start"]),
        end=float(numbers["beta_end"]),
        steps=int(numbers["num_train_timesteps"]),
    )
