"""The validation loss: the same images, time steps and noise every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lycotool.lazy import torch
from lycotool.training.data.batches import plan_validation
from lycotool.training.data.captions import caption_of
from lycotool.training.diffusion_options import NoiseOptions
from lycotool.training.draws import Draws
from lycotool.training.inputs import InputMaker, Inputs
from lycotool.training.randomness import torch_generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lycotool.training.data.dataset import Batch
    from lycotool.training.loop import Run

#: Index: example, time step.
NOISE = "validation noise"

#: Time steps each image is judged at.
_TIMESTEPS = 4


def validation_timesteps(options: NoiseOptions) -> list[int]:
    """Evenly inside the range that is trained: 200, 400, 600, 800 of 1000.

    Source: sd-scripts ``train_network.py``, ``np.linspace(min, max, 6, dtype=int)[1:-1]``.
    """
    ends = np.linspace(options.min_timestep, options.max_timestep, _TIMESTEPS + 2, dtype=int)
    return [int(step) for step in ends[1:-1]]


class Validation:
    """Judges a run on its validation images.

    Parameters
    ----------
    inputs
        Of the validation images.
    limit
        Batches at most.
    """

    def __init__(self, inputs: InputMaker, noise: NoiseOptions, *, seed: int, limit: int | None) -> None:
        self._inputs = inputs
        self._timesteps = validation_timesteps(noise)
        self._seed = seed
        self._batches = plan_validation(inputs.dataset)[:limit]

    @torch.no_grad()
    def loss(self, run: Run) -> float:
        """The mean loss of all images at all time steps, weighted as in training.

        The processes share the batches; the mean is over the same numbers in the same order.
        """
        world = run.world
        mine = [
            torch.cat([run.losses(inputs) for inputs in self._at_all_times(batch)]).cpu()
            for batch in self._batches[world.rank :: world.size]
        ]
        parts = world.gather(mine)
        found = [parts[place % world.size][place // world.size] for place in range(len(self._batches))]
        return float(torch.cat(found).mean())

    def _at_all_times(self, batch: Batch) -> Iterator[Inputs]:
        dataset = self._inputs.dataset
        captions = [caption_of(dataset, sample, seed=self._seed, epoch=0, step=0) for sample in batch.samples]
        latents, size_ids = self._inputs.latents.sample(batch, seed=self._seed, step=0)
        for timestep in self._timesteps:
            noise = [
                torch.randn(
                    latents.shape[1:], generator=torch_generator(self._seed, NOISE, s.example, timestep)
                )
                for s in batch.samples
            ]
            draws = Draws(torch.full((len(noise),), timestep), torch.stack(noise))
            yield self._inputs.assemble(batch, captions, latents, size_ids, draws)
