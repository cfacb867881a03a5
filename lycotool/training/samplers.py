"""Samplers of images while training: diffusers' own, on the run's noise schedule."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lycotool.errors import UsageError
from lycotool.lazy import torch
from lycotool.training.output_options import Sampler

if TYPE_CHECKING:
    from torch import Tensor

#: Smallest ᾱ: a sampler in terms of σ = √((1 - ᾱ)/ᾱ) needs it above 0. diffusers' own floor.
_FLOOR = 2.0**-24

_CLASSES: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


def make_sampler(name: Sampler, alphas_cumprod: Tensor, *, prediction: str) -> Any:  # noqa: ANN401 - untyped
    """The scheduler of diffusers for a name, for ``ᾱ`` of the training.

    A schedule that ends in pure noise is sampled from its very end (``trailing``).

    Raises
    ------
    UsageError
        If the sampler cannot do that.
    """
    import diffusers

    name_of_class, arguments = _CLASSES[name]
    ends_in_noise = bool(alphas_cumprod[-1] < _FLOOR)
    alphas = alphas_cumprod.double().cpu().clamp_min(_FLOOR)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    cls = getattr(diffusers, name_of_class)
    if "timestep_spacing" in inspect.signature(cls.__init__).parameters:
        arguments = {**arguments, "timestep_spacing": "trailing" if ends_in_noise else "leading"}
    elif ends_in_noise:
        raise UsageError(f"the sampler {name} cannot begin at pure noise, where this schedule ends")
    with quiet():
        return cls(
            num_train_timesteps=len(alphas),
            trained_betas=betas.tolist(),
            prediction_type=prediction,
            **arguments,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what diffusers says of its own future, and of NumPy's, from users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def takes_generator(scheduler: Any) -> bool:  # noqa: ANN401 - untyped
    """Whether its step draws noise."""
    return "generator" in inspect.signature(scheduler.step).parameters
