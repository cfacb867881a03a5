"""The hashes of a base model that adapters carry in their metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lycotool.io.hashes import LEGACY_START, LEGACY_STOP
from lycotool.lazy import torch

_CHUNK_BYTES = 8 * 2**20


def sha256_of(path: Path) -> str:
    """SHA-256 of the whole file: ``ss_new_sd_model_hash``."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def old_hash_of(path: Path) -> str:
    """First 8 hex digits of the SHA-256 of bytes 0x100000 to 0x110000: ``ss_sd_model_hash``.

    Source: sd-scripts ``library/train_util.py``, ``model_hash``. A shorter file gives the
    hash of what there is.
    """
    with path.open("rb") as file:
        file.seek(LEGACY_START)
        return hashlib.sha256(file.read(LEGACY_STOP - LEGACY_START)).hexdigest()[:8]


def fingerprint_of(*models: torch.nn.Module) -> str:
    """SHA-256 over every parameter's name, dtype, shape and values, of the models in order.

    It is the same wherever the weights came from, and another when any of them is, so it is
    what a cache of a model's outputs is kept by.
    """
    digest = hashlib.sha256()
    for model in models:
        held = (entry for entry in model.named_buffers() if entry[0].endswith((".stored", ".scale")))
        for name, value in (*model.named_parameters(), *held):  # weights in 8 bits are buffers
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        digest.update(b"\n")
    return digest.hexdigest()
