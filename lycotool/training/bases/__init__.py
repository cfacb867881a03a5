"""Base models: detected, loaded strictly and without a network, and run.

``load_base`` opens a single file or a diffusers folder; ``encode_text``, ``encode_images``,
``predict`` and ``decode_latents`` hide how the families differ.
"""

from __future__ import annotations

from lycotool.training.bases.images import decode_latents, encode_images, save_vae_memory
from lycotool.training.bases.load import load_base
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.predict import predict
from lycotool.training.bases.schedule import with_zero_terminal_snr
from lycotool.training.bases.text import Conditioning, encode_text

__all__ = [
    "BaseModel",
    "Conditioning",
    "decode_latents",
    "encode_images",
    "encode_text",
    "load_base",
    "predict",
    "save_vae_memory",
    "with_zero_terminal_snr",
]
