"""What tests of whole runs share: small pictures, options for them, a run in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from makers.bases import Family, MicroBase, micro_base, write_file, write_folder
from PIL import Image

from lycotool.training import config
from lycotool.training.assemble import input_maker, latents_of, make_run
from lycotool.training.bases.load import load_base
from lycotool.training.bases.model import BaseModel
from lycotool.training.between import evaluating
from lycotool.training.data.images import to_pixels
from lycotool.training.data.reading import read_dataset
from lycotool.training.loop import Run
from lycotool.training.observe import Observer, StepRecord
from lycotool.training.options import TrainOptions
from lycotool.training.plan import StepPlan
from lycotool.training.setup import Trainable, prepare
from lycotool.training.validation import Validation

#: Pictures the VAE halves to 8x8 latents: what matters here does not need more.
SIDE = 16

#: Options that fit such pictures; everything else is as users have it.
SMALL: Mapping[str, Any] = {
    "resolution": (SIDE, SIDE),
    "min_bucket_reso": SIDE,
    "bucket_reso_steps": 8,
    "batch_size": 4,
    "device": "cpu",
}

COLOURS = ((220, 30, 30), (30, 200, 60), (40, 60, 220), (230, 220, 40))
CAPTIONS = ("a red disk", "a green square", "blue stripes", "a yellow cross")


def picture(kind: int, *, shift: int = 0, side: int = SIDE) -> Image.Image:
    """One of four simple pictures."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = x - side // 2 - shift, y - side // 2
    radius = side * 0.32
    inside = (
        (x**2 + y**2 < radius**2, torch.maximum(x.abs(), y.abs()) < radius, (x // 4) % 2 == 0,
         torch.minimum(x.abs(), y.abs()) < side // 8)[kind]
    )  # fmt: skip
    background, colour = torch.tensor([30 * kind] * 3), torch.tensor(COLOURS[kind])
    pixels = torch.where(inside[..., None], colour, background).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


#: Captions that fill a text encoder's window: short ones leave it mostly padding, the same for all.
LONG_CAPTIONS = tuple(" ".join([caption] * 30) for caption in CAPTIONS)


def write_pictures(
    folder: Path, *, shift: int = 0, captions: tuple[str, ...] = CAPTIONS, side: int = SIDE
) -> Path:
    """The four pictures with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, caption in enumerate(captions):
        picture(kind, shift=shift, side=side).save(folder / f"{kind}.png")
        (folder / f"{kind}.txt").write_text(caption, encoding="utf-8")
    return folder


@lru_cache(maxsize=3)
def base_file(family: Family) -> Path:
    """A micro base as a single file, made once."""
    path = Path(mkdtemp(prefix="lycotool-tests-")) / f"{family}.safetensors"
    metadata = {"modelspec.prediction_type": "epsilon"}
    return write_file(with_clear_latents(micro_base(family)), path, metadata=metadata)


@lru_cache(maxsize=3)
def base_folder(family: Family) -> Path:
    """The same as a diffusers folder, made once.

    A micro model has fewer layers in a block than the published one, so numbers in LDM's names
    mean other blocks than published adapter names do: only diffusers' names are unambiguous.
    """
    path = Path(mkdtemp(prefix="lycotool-tests-")) / family
    return write_folder(with_clear_latents(micro_base(family)), path)


@torch.no_grad()
def with_clear_latents(base: MicroBase) -> MicroBase:
    """Let the VAE tell pictures apart, as a trained one does: unit variance, hardly any noise.

    A random one gives every picture nearly the same mean, far below its own noise.
    """
    pixels = torch.stack([to_pixels(picture(kind), flipped=False) for kind in range(len(CAPTIONS))])
    scale = base.vae.config.scaling_factor
    convolution = base.vae.quant_conv
    convolution.weight[4:] = 0
    convolution.bias[4:] = -20
    means = base.vae.encode(pixels).latent_dist.mean
    convolution.bias[:4] -= means.mean(dim=(0, 2, 3))
    shrink = (scale * means.std(dim=(0, 2, 3))).clamp_min(1e-6)
    convolution.weight[:4] /= shrink.view(-1, 1, 1, 1)
    convolution.bias[:4] /= shrink
    return base


@lru_cache(maxsize=4)
def _loaded(family: Family, prediction: str | None = None) -> BaseModel:
    return load_base(str(base_file(family)), prediction=prediction)


class InMemory:
    """A run whose base is shared with other runs: its layers are given back at the end."""

    def __init__(self, dataset: Path, family: Family = "sd1", **values: Any) -> None:
        self.options = options(dataset, family, **values)
        base = _loaded(family, self.options.model.prediction)
        self.ready: Trainable = prepare(self.options, load_weights=lambda path: {}, base=base)
        self.run: Run = make_run(self.ready, Observer())

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.run.network.detach()


def options(dataset: Path, family: Family = "sd1", **values: Any) -> TrainOptions:
    """Options for small pictures."""
    given = {**SMALL, "base": str(base_file(family)), "dataset": str(dataset), **values}
    return config.build(given)


class Records(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[tuple[int, float]] = []
        self.saves: list[tuple[int, str]] = []
        self.samples: list[tuple[int, tuple[str, ...]]] = []
        self.warnings: list[str] = []

    @property
    def losses(self) -> list[float]:
        """Of every step."""
        return [record.loss for record in self.steps]

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def validated(self, step: int, loss: float) -> None:
        self.validations.append((step, loss))

    def saved(self, step: int, path: str) -> None:
        self.saves.append((step, path))

    def sampled(self, step: int, paths: Any) -> None:
        self.samples.append((step, tuple(paths)))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Judge:
    """The loss on some pictures at fixed time steps and noise: a number that training alone changes."""

    def __init__(self, made: InMemory, folder: Path) -> None:
        ready = made.ready
        dataset = read_dataset(str(folder), ready.options.data)
        latents = latents_of(ready.options, ready.base, dataset, Observer())
        inputs = input_maker(ready, dataset, latents, made.run.inputs.texts)
        self._made = made
        self._parts = [Validation(inputs, ready.options.noise, seed=seed, limit=None) for seed in range(2)]

    def __call__(self) -> float:
        with evaluating(self._made.run):
            return sum(part.loss(self._made.run) for part in self._parts) / len(self._parts)


class Nothing:
    """Events of a run that writes nothing."""

    def before(self) -> None: ...

    def after(self, planned: StepPlan) -> None: ...

    def is_due(self, planned: StepPlan) -> bool:
        return False

    def interrupted(self, done: int) -> None: ...
