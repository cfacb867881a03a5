"""Small pictures and data sets of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, size: tuple[int, int] = (64, 64), *, seed: int = 0) -> Path:
    """A picture of noise; the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pictures(folder: Path, captions: Mapping[str, str | None], size: tuple[int, int] = (64, 64)) -> Path:
    """Pictures named by the keys; a value other than None is the caption beside it."""
    for seed, (name, caption) in enumerate(captions.items()):
        path = picture(folder / name, size, seed=seed)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, "utf-8")
    return folder
