"""From a batch of the plan to what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.text import Conditioning, encode_text
from lycotool.training.data.captions import caption_of
from lycotool.training.data.dataset import Batch, Dataset
from lycotool.training.data.latents import LatentCache
from lycotool.training.data.texts import TextCache
from lycotool.training.data.tokens import Tokenizer
from lycotool.training.diffusion_options import NoiseOptions
from lycotool.training.draws import Draws, draw
from lycotool.training.tree import to_device, with_tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything one forward pass reads; ``B`` samples of one bucket, on the device.

    Attributes
    ----------
    latents
        ``(B, C, H, W)``, scaled, float32.
    token_ids
        Per text encoder, ``(B, windows, 77)``; empty where ``text`` is there.
    text
        What frozen text encoders made of them; None where they are trained.
    size_ids
        ``(B, 6)``; read by SDXL.
    weights
        ``(B,)``: the loss's factor of each sample.
    files
        Names of the images, for messages.
    """

    latents: Tensor
    draws: Draws
    token_ids: list[Tensor]
    text: Conditioning | None
    size_ids: Tensor
    weights: Tensor
    files: tuple[str, ...]


class InputMaker:
    """Makes inputs; all randomness of a step is here, on the CPU.

    Parameters
    ----------
    texts
        The cache of a run whose text encoders are frozen, else None.
    total_steps
        Of the run, for the tag warm-up.
    rank, ranks
        Which part of each batch: every ``ranks``-th sample from ``rank``.
    """

    def __init__(
        self,
        base: BaseModel,
        dataset: Dataset,
        latents: LatentCache,
        texts: TextCache | None,
        *,
        noise: NoiseOptions,
        max_token_length: int,
        seed: int,
        total_steps: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.base = base
        self.dataset = dataset
        self.latents = latents
        self.texts = texts
        self._noise = noise
        self._max_token_length = max_token_length
        self._seed = seed
        self._total_steps = total_steps
        self._rank = rank
        self._ranks = ranks
        self._tokenizers = [Tokenizer("zero" if pad == 0 else "eos") for pad in base.pad_tokens]

    def make(self, batch: Batch, *, step: int, first: int) -> Inputs:
        """The own part of a batch whose first sample is number ``first`` of the step.

        A sample keeps its number, so all that is drawn for it is what one process alone draws.
        Where a batch is too small for all, a process that is left over computes the first sample
        with a weight of 0: it takes part in the step, and adds nothing.
        """
        part = batch.of_rank(self._rank, self._ranks)
        if part.samples:
            return self._inputs(part, step=step, first=first + self._rank)
        inputs = self._inputs(batch.of_rank(0, len(batch.samples)), step=step, first=first)
        return replace(inputs, weights=torch.zeros_like(inputs.weights))

    def _inputs(self, batch: Batch, *, step: int, first: int) -> Inputs:
        captions = [
            caption_of(
                self.dataset,
                sample,
                seed=self._seed,
                epoch=batch.epoch,
                step=step,
                total_steps=self._total_steps,
            )
            for sample in batch.samples
        ]
        latents, size_ids = self.latents.sample(batch, seed=self._seed, step=step)
        shape = latents.shape[1], latents.shape[2], latents.shape[3]
        draws = draw(
            self._noise,
            shape,
            seed=self._seed,
            step=step,
            first=first,
            count=len(batch.samples),
            stride=self._ranks,
        )
        return self.assemble(batch, captions, latents, size_ids, draws)

    def assemble(
        self, batch: Batch, captions: Sequence[str], latents: Tensor, size_ids: Tensor, draws: Draws
    ) -> Inputs:
        """Inputs of a batch from its parts; ``latents`` are unscaled."""
        device = self.base.device
        ids = self.token_ids(captions)
        examples = [self.dataset.examples[sample.example] for sample in batch.samples]
        text = self.text(ids)
        inputs = Inputs(
            latents=latents * self.base.latent_scale,
            draws=draws,
            token_ids=ids if text is None else [],
            text=text,
            size_ids=size_ids,
            weights=torch.tensor([example.loss_weight for example in examples]),
            files=tuple(example.path.name for example in examples),
        )
        return with_tensors(inputs, lambda tensor: to_device(tensor, device))

    def token_ids(self, captions: Sequence[str]) -> list[Tensor]:
        """Per text encoder, ``(B, windows, 77)``."""
        return [
            torch.stack([tokenizer.ids(caption, self._max_token_length) for caption in captions])
            for tokenizer in self._tokenizers
        ]

    def text(self, ids: list[Tensor]) -> Conditioning | None:
        """What frozen text encoders make of tokens; None where they are trained."""
        if self.texts is None:
            return None
        found = self.texts.get(ids)
        return Conditioning(found.hidden, found.pooled)


def conditioning_of(base: BaseModel, inputs: Inputs, clip_skip: int | None) -> Conditioning:
    """The cached text, or what the trained encoders make of the tokens now."""
    if inputs.text is not None:
        return inputs.text
    return encode_text(base, inputs.token_ids, clip_skip=clip_skip)
