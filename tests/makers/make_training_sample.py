"""Write what README trains on: ``python tests/makers/make_training_sample.py BASE [--pictures FOLDER]``.

BASE becomes a diffusers folder of the micro SD 1.x model in ``bases.py``: random weights, 10 MB, of which CLIP's
vocabulary takes 6; that is why it is made and not kept. ``--pictures`` writes the four pictures of
``tests/data/pictures`` again, which are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# As a program, this file is not part of a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw

from makers.bases import micro_base, write_folder

SIDE = 32
PICTURES = {
    "disk": "a red disk on black",
    "square": "a green square on grey",
    "stripes": "blue stripes on white",
    "cross": "a yellow cross on violet",
}


def picture(name: str) -> Image.Image:
    """One of the four."""
    background = {"disk": "black", "square": "grey", "stripes": "white", "cross": "purple"}[name]
    image = Image.new("RGB", (SIDE, SIDE), background)
    draw = ImageDraw.Draw(image)
    if name == "disk":
        draw.ellipse((6, 6, 25, 25), fill="red")
    elif name == "square":
        draw.rectangle((8, 8, 23, 23), fill="green")
    elif name == "stripes":
        for left in range(0, SIDE, 8):
            draw.rectangle((left, 0, left + 3, SIDE), fill="blue")
    else:
        draw.rectangle((13, 4, 18, 27), fill="yellow")
        draw.rectangle((4, 13, 27, 18), fill="yellow")
    return image


def main() -> None:
    """Write the checkpoint, and the pictures if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    write_folder(micro_base("sd1"), arguments.base)
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        for name, caption in PICTURES.items():
            picture(name).save(arguments.pictures / f"{name}.png", optimize=True)
            (arguments.pictures / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
