"""A base model in memory: the networks an adapter is trained on, and the facts about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lycotool.lazy import torch
from lycotool.models.families.table import ModuleTable
from lycotool.training.bases.configs import FamilyName
from lycotool.training.bases.detect import Prediction, Predicts
from lycotool.training.bases.hashes import fingerprint_of, old_hash_of, sha256_of
from lycotool.training.bases.schedule import with_zero_terminal_snr

#: Token that fills a caption up, by family and text encoder: CLIP's end token, or ``!``.
PAD_TOKENS: Mapping[FamilyName, tuple[int, ...]] = {"sd1": (49407,), "sd2": (0,), "sdxl": (49407, 0)}


@dataclass
class BaseModel:
    """A loaded base: frozen networks in evaluation mode, without gradients.

    Attributes
    ----------
    path
        What the user named.
    family
        ``sd1``, ``sd2`` or ``sdxl``.
    predicts
        What the UNet predicts, and where that is known from.
    unet, vae, text_encoders
        Classes of diffusers and transformers.
    unet_table
        The UNet's modules in both namings.
    latent_scale
        The UNet works on latents times this.
    base_alphas
        ᾱ of the schedule as float64, before any rescaling.
    unet_dtype, vae_dtype, te_dtype, device
        Of the frozen weights. The models' own ``dtype`` is that of any parameter, which may
        be an adapter's.
    file
        The single file it came from; None for a folder or shards.
    files
        Every file its weights came from, another VAE's too.
    vae_path, vae_file
        What the user named for a VAE, and the file itself; None without one.
    warnings
        What was odd about the files.
    """

    path: str
    family: FamilyName
    predicts: Predicts
    unet: Any
    vae: Any
    text_encoders: list[Any]
    unet_table: ModuleTable
    latent_scale: float
    base_alphas: torch.Tensor
    unet_dtype: torch.dtype
    vae_dtype: torch.dtype
    te_dtype: torch.dtype
    device: torch.device
    file: Path | None = None
    files: tuple[Path, ...] = ()
    vae_path: str | None = None
    vae_file: Path | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)

    @property
    def prediction(self) -> Prediction:
        """``epsilon`` or ``v_prediction``."""
        return self.predicts.prediction

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the base says that its schedule ends in pure noise."""
        return self.predicts.zero_terminal_snr

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ as float64, rescaled where the base says that its schedule ends in pure noise."""
        return with_zero_terminal_snr(self.base_alphas) if self.zero_terminal_snr else self.base_alphas

    @cached_property
    def content_hash(self) -> str:
        """A hash of every file the weights came from, wherever they lie: what a run is resumed by."""
        digests = [self.sha256 if path == self.file else sha256_of(path) for path in self.files]
        return hashlib.sha256("\n".join(str(digest) for digest in digests).encode()).hexdigest()

    @property
    def pad_tokens(self) -> tuple[int, ...]:
        """What fills a caption up, by text encoder."""
        return PAD_TOKENS[self.family]

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent's area: 8 for published models."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 of the file, computed when first asked for; None for a folder or shards."""
        return None if self.file is None else sha256_of(self.file)

    @cached_property
    def old_hash(self) -> str | None:
        """The short hash that sd-scripts stores; None for a folder or shards."""
        return None if self.file is None else old_hash_of(self.file)

    @cached_property
    def vae_sha256(self) -> str | None:
        """SHA-256 of the VAE's own file; None without one."""
        return None if self.vae_file is None else sha256_of(self.vae_file)

    @cached_property
    def vae_old_hash(self) -> str | None:
        """The short hash of the VAE's own file; None without one."""
        return None if self.vae_file is None else old_hash_of(self.vae_file)

    @cached_property
    def vae_fingerprint(self) -> str:
        """A hash of the VAE's weights as they are used, for caches of latents."""
        return fingerprint_of(self.vae)

    @cached_property
    def text_fingerprint(self) -> str:
        """A hash of the text encoders' weights, for caches of their outputs.

        To be asked for while no adapter is in them.
        """
        return fingerprint_of(*self.text_encoders)
