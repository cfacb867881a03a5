"""Aspect-ratio buckets, as sd-scripts makes and chooses them.

Source: sd-scripts ``library/model_util.py`` ``make_bucket_resolutions`` and
``library/train_util.py`` ``BucketManager.select_bucket``. Two differences: the default
longest side is twice the resolution (theirs, 1024, leaves SDXL without a bucket of its own
area other than the square), and crop coordinates are where the image was really cropped.
All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from lycotool.errors import UsageError
from lycotool.training.data.options import DataOptions, Size


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image becomes a training image: resized to ``resized``, cropped to ``bucket``."""

    bucket: Size
    resized: Size

    @property
    def spare(self) -> Size:
        """Pixels cropped away, in each direction."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]

    @property
    def centre(self) -> Size:
        """Left and top of the centre crop."""
        return self.spare[0] // 2, self.spare[1] // 2


@lru_cache(maxsize=64)
def bucket_sizes(resolution: Size, shortest: int, longest: int, step: int) -> tuple[Size, ...]:
    """Every bucket: sides multiples of ``step``, area at most that of ``resolution``, sorted.

    For each side from ``shortest`` to ``longest`` the other one is the longest that the area
    allows; both ways round; and the square.
    """
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area) // step) * step
    sizes = {(side, side)}
    for one in range(shortest, longest + 1, step):
        other = min(longest, area // one // step * step)
        if other >= shortest:
            sizes |= {(one, other), (other, one)}
    return tuple(sorted(sizes))


def limits(options: DataOptions) -> tuple[int, int]:
    """Shortest and longest side of a bucket, as multiples of the step."""
    assert options.resolution is not None
    step = options.bucket_reso_steps
    longest = options.max_bucket_reso or 2 * max(options.resolution)
    return max(step, options.min_bucket_reso // step * step), -(-longest // step) * step


def place(size: Size, options: DataOptions) -> Placement:
    """The bucket of an image of this size, and the size it is resized to before the crop.

    Raises
    ------
    UsageError
        If the image is smaller than a bucket's step and must not be enlarged.
    """
    assert options.resolution is not None
    if not options.enable_bucket:
        return _cover(size, options.resolution)
    if options.bucket_no_upscale:
        return _shrink(size, options.resolution, options.bucket_reso_steps)
    sizes = bucket_sizes(options.resolution, *limits(options), options.bucket_reso_steps)
    if size in sizes:
        return Placement(size, size)
    ratio = size[0] / size[1]
    # The first of the nearest: `min` keeps it, as `argmin` does.
    return _cover(size, min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio)))


def _cover(size: Size, bucket: Size) -> Placement:
    """Scale the image so that it just covers the bucket."""
    width, height = size
    wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if wider else bucket[0] / width
    # Never below the bucket, whatever the rounding of the scale.
    resized = max(bucket[0], int(width * scale + 0.5)), max(bucket[1], int(height * scale + 0.5))
    return Placement(bucket, resized)


def _shrink(size: Size, resolution: Size, step: int) -> Placement:
    """Shrink an image whose area is too large; the bucket is what is left, rounded down."""
    area = resolution[0] * resolution[1]
    resized = size
    if size[0] * size[1] > area:
        ratio = size[0] / size[1]
        width = math.sqrt(area * ratio)
        by_width = _round(width, step)
        by_height = _round(area / width, step)
        # Which of the two sides to round: the one that changes the ratio less.
        width_error = _error(by_width, _round(by_width / ratio, step), ratio)
        height_error = _error(_round(by_height * ratio, step), by_height, ratio)
        if width_error < height_error:
            resized = by_width, int(by_width / ratio + 0.5)
        else:
            resized = int(by_height * ratio + 0.5), by_height
    bucket = resized[0] - resized[0] % step, resized[1] - resized[1] % step
    if min(bucket) < step:
        raise UsageError(
            f"{size[0]}x{size[1]} pixels are too few for a bucket of multiples of {step}",
            hint="leave out `bucket_no_upscale`, or lower `bucket_reso_steps`",
        )
    return Placement(bucket, resized)


def _round(value: float, step: int) -> int:
    whole = int(value + 0.5)
    return whole - whole % step


def _error(width: int, height: int, ratio: float) -> float:
    return abs(width / height - ratio) if height else math.inf


@dataclass(frozen=True, slots=True)
class SizeIds:
    """SDXL's size conditioning of one image, all (width, height) or (left, top) in pixels."""

    original: Size
    crop: Size
    target: Size

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """In the UNet's order: original height, width; crop top, left; target height, width."""
        return (*self.original[::-1], *self.crop[::-1], *self.target[::-1])


def size_ids(original: Size, placement: Placement, crop: Size, *, flipped: bool) -> SizeIds:
    """The conditioning of an image cropped at ``crop`` (left, top) of its resized form.

    Mirroring swaps the left and the right crop, as in Stability's training.
    """
    left, top = crop
    if flipped:
        left = placement.spare[0] - left
    return SizeIds(original, (left, top), placement.bucket)
