"""Images made while training: the same prompts and seeds each time, as PNG files and one grid."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.errors import OutputError
from lycotool.lazy import torch
from lycotool.training.bases.images import decode_latents
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.predict import predict
from lycotool.training.bases.text import Conditioning, encode_text
from lycotool.training.inputs import InputMaker
from lycotool.training.output_options import Sampler
from lycotool.training.prompts import Prompt
from lycotool.training.randomness import seed_of, torch_generator
from lycotool.training.samplers import make_sampler, quiet, takes_generator

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

#: Seed of a prompt that has none; index: which prompt.
PROMPT_SEED = "sample prompt"
#: First latent, with the prompt's seed; no index.
START = "sample start"
#: Noise of a sampler's steps, with the prompt's seed; no index.
SAMPLER = "sample noise"


class ImageMaker:
    """Makes the images of some prompts with the model as it is.

    Parameters
    ----------
    inputs
        Whose tokenizers and cached text serve prompts, too.
    alphas_cumprod
        Of the training's noise schedule.
    size
        Width and height where a prompt has none, in pixels.
    """

    def __init__(
        self,
        base: BaseModel,
        inputs: InputMaker,
        prompts: Sequence[Prompt],
        *,
        alphas_cumprod: Tensor,
        size: tuple[int, int],
        sampler: Sampler,
        seed: int,
        clip_skip: int | None,
        folder: Path,
    ) -> None:
        self.base = base
        self.prompts = tuple(prompts)
        self._inputs = inputs
        self._alphas = alphas_cumprod
        self._size = size
        self._sampler = sampler
        self._seed = seed
        self._clip_skip = clip_skip
        self._folder = folder

    def make(self, step: int) -> list[Path]:
        """Write ``stepNNNNNNNN-NN.png`` for each prompt and ``stepNNNNNNNN.png``, the grid.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        images = [self.image(number) for number in range(len(self.prompts))]
        paths = [self._folder / f"step{step:08d}-{number:02d}.png" for number in range(len(images))]
        paths.append(self._folder / f"step{step:08d}.png")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path, image in zip(paths, [*images, grid(images)], strict=True):
                _write(path, image)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", path=self._folder) from None
        return paths

    @torch.no_grad()
    def image(self, number: int) -> Image:
        """The image of one prompt."""
        import PIL.Image

        prompt = self.prompts[number]
        seed = seed_of(self._seed, PROMPT_SEED, number) if prompt.seed is None else prompt.seed
        with quiet():
            latents = self._denoised(prompt, seed)
        pixels = decode_latents(self.base, latents)[0]
        bytes_ = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        return PIL.Image.fromarray(bytes_.cpu().numpy())

    def _denoised(self, prompt: Prompt, seed: int) -> Tensor:
        base = self.base
        latents: Tensor
        cell = base.pixels_per_latent
        width, height = ((given or own) // cell * cell for given, own in zip((prompt.width, prompt.height), self._size, strict=True))  # fmt: skip
        scheduler = make_sampler(
            prompt.sample_sampler or self._sampler, self._alphas, prediction=base.prediction
        )
        scheduler.set_timesteps(prompt.sample_steps, device=base.device)
        guided = prompt.scale != 1.0
        text = self._text([prompt.negative_prompt, prompt.prompt] if guided else [prompt.prompt])
        rows = len(text.hidden)
        size_ids = torch.tensor([[height, width, 0, 0, height, width]] * rows, device=base.device)
        shape = (1, 4, height // cell, width // cell)
        start = torch.randn(shape, generator=torch_generator(seed, START))
        latents = start.to(base.device) * scheduler.init_noise_sigma
        drawn = {"generator": torch_generator(seed, SAMPLER)} if takes_generator(scheduler) else {}
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(latents, timestep).expand(rows, -1, -1, -1)
            prediction = predict(base, seen, timestep.expand(rows), text, size_ids).float()
            if guided:
                without, with_prompt = prediction.chunk(2)
                prediction = without + prompt.scale * (with_prompt - without)
            latents = scheduler.step(prediction, timestep, latents, **drawn).prev_sample
        return latents

    def _text(self, captions: list[str]) -> Conditioning:
        ids = self._inputs.token_ids(captions)
        text = self._inputs.text(ids)
        return encode_text(self.base, ids, clip_skip=self._clip_skip) if text is None else text


def grid(images: Sequence[Image]) -> Image:
    """All images in as square a grid as they fill, each at the top left of its cell."""
    import PIL.Image

    columns = math.ceil(math.sqrt(len(images)))
    width, height = max(i.width for i in images), max(i.height for i in images)
    whole = PIL.Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for number, image in enumerate(images):
        whole.paste(image, (number % columns * width, number // columns * height))
    return whole


def _write(path: Path, image: Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
