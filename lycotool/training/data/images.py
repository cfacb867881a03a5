"""Image files to pixels: what a viewer shows, as 8-bit sRGB.

EXIF orientation is applied. Transparency is laid over white (dropping alpha shows whatever
colour hides behind it). 16-bit greyscale is scaled, not clipped. CMYK and images with a colour
profile other than sRGB are converted by it. Of an animation the first frame is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.errors import BadInputError, UsageError
from lycotool.lazy import torch
from lycotool.training.data.buckets import Placement
from lycotool.training.data.options import Size

if TYPE_CHECKING:
    from PIL import Image

#: What sd-scripts reads, and TIFF. AVIF and JPEG XL need a Pillow that reads them.
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jxl"})

#: Other files that are pictures, and are named when they are left aside.
FOREIGN_EXTENSIONS = frozenset({".gif", ".heic", ".heif", ".psd", ".svg", ".jfif", ".ico", ".tga", ".mp4"})

_ORIENTATION = 0x0112

#: EXIF orientations that swap width and height.
_TURNED = frozenset({5, 6, 7, 8})


def image_size(path: Path) -> Size:
    """Width and height as a viewer shows them, from the header alone.

    Raises
    ------
    BadInputError
        If the file is not an image.
    """
    with _opened(path) as image:
        if image.format == "TIFF":
            image.load()  # Pillow turns these itself then, and says so only afterwards
        width, height = image.size
        return (height, width) if _orientation(image) in _TURNED else (width, height)


def load_image(path: Path) -> Image.Image:
    """The whole image, upright, mode ``RGB``.

    Raises
    ------
    BadInputError
        If the file is not an image, is cut short, or has floating-point pixels.
    """
    with _opened(path) as image:
        image.load()
        return _upright(_as_rgb(image, path), _orientation(image))


def fitted(image: Image.Image, placement: Placement, crop: Size, interpolation: str) -> Image.Image:
    """Resize to ``placement.resized``, then cut the bucket out at ``crop`` (left, top)."""
    from PIL import Image

    filters = {
        "lanczos": Image.Resampling.LANCZOS,
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "box": Image.Resampling.BOX,
        "area": Image.Resampling.BOX,
        "nearest": Image.Resampling.NEAREST,
    }
    if image.size != placement.resized:
        image = image.resize(placement.resized, filters[interpolation])
    left, top = crop
    return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1]))


def to_pixels(image: Image.Image, *, flipped: bool = False) -> torch.Tensor:
    """An ``RGB`` image as float32 ``(3, H, W)`` in [-1, 1], mirrored if ``flipped``."""
    import numpy as np

    values = torch.from_numpy(np.array(image, dtype=np.uint8))  # (H, W, 3)
    pixels = values.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0)
    return pixels.flip(2) if flipped else pixels.contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, with whatever its decoder raises turned into one kind of error."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UsageError(
            "training needs the package pillow", hint="`pip install 'lycotool[train]'`"
        ) from None
    try:
        with Image.open(path) as image:
            if min(image.size) < 1:
                raise BadInputError("the image has no pixels", path=path)
            yield image
    except UnidentifiedImageError:
        raise BadInputError("is not an image that can be read", path=path) from None
    except Image.DecompressionBombError as error:
        raise BadInputError(str(error).rstrip("."), path=path) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        reason = str(error) or type(error).__name__
        raise BadInputError(f"the image cannot be read: {reason}", path=path) from None


def _orientation(image: Image.Image) -> int:
    # A PNG whose EXIF stands behind its data would have to be decoded to find it.
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}:
        return 1
    return int(image.getexif().get(_ORIENTATION, 1) or 1)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise BadInputError("the image has floating-point pixels", path=path, hint="store it with 8 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return _in_srgb(image)


def _from_16_bits(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    scaled = np.clip(np.rint(values / 257), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert by the embedded colour profile, if there is one that can be used."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image.convert("RGB")
    from io import BytesIO

    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")
    return image.convert("RGB") if converted is None else converted
