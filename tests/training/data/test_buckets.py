"""Buckets against what sd-scripts 48d368fa made and chose.

`buckets.json` holds calls of its ``BucketManager.select_bucket``: resolution, shortest, longest,
step, no_upscale, image, and the bucket and size it answered. 20 000 random calls agreed when
the file was made; these are every fiftieth or so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.errors import UsageError
from lycotool.training.data.buckets import bucket_sizes, limits, place, size_ids
from lycotool.training.data.options import DataOptions

CHOICES = json.loads((Path(__file__).parent / "buckets.json").read_text())


def both_ways(*sizes):
    return {size for w, h in sizes for size in ((w, h), (h, w))}


def test_sizes_of_512():
    expected = both_ways(
        (256, 832),
        (256, 896),
        (256, 960),
        (256, 1024),
        (320, 704),
        (320, 768),
        (384, 640),
        (448, 576),
        (512, 512),
    )
    sizes = bucket_sizes((512, 512), 256, 1024, 64)
    assert len(sizes) == 17
    assert set(sizes) == expected
    assert list(sizes) == sorted(sizes)


def test_sizes_of_512_within_320_and_960():
    expected = both_ways((320, 704), (320, 768), (384, 640), (448, 576), (512, 512))
    assert set(bucket_sizes((512, 512), 320, 960, 64)) == expected


@pytest.mark.parametrize(("side", "longest", "count"), [(768, 1024, 19), (1024, 1024, 25), (1024, 2048, 41)])
def test_number_of_sizes(side, longest, count):
    assert len(bucket_sizes((side, side), 256, longest, 64)) == count


def test_sdxl_has_its_own_buckets_by_default():
    options = DataOptions(resolution=(1024, 1024))
    assert limits(options) == (256, 2048)
    assert {(832, 1216), (896, 1152), (768, 1344)} <= set(bucket_sizes((1024, 1024), *limits(options), 64))


@pytest.mark.parametrize(
    ("resolution", "low", "high", "step", "no_upscale", "image", "bucket", "resized"), CHOICES
)
def test_choices_are_sd_scripts(resolution, low, high, step, no_upscale, image, bucket, resized):
    options = DataOptions(
        resolution=tuple(resolution),
        min_bucket_reso=low,
        max_bucket_reso=high,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
    )
    placement = place(tuple(image), options)
    assert placement.bucket == tuple(bucket)
    assert placement.resized == tuple(resized)


def _with_rounding(ratio: float, side: int) -> float:
    """The area where sd-scripts rounds one side to whole pixels, up by half of one, and then the other."""
    width, height = side * math.sqrt(ratio), side / math.sqrt(ratio)
    by_width = (width + 0.5) * ((width + 0.5) / ratio + 0.5)
    return max(by_width, (height + 0.5) * ((height + 0.5) * ratio + 0.5))


sides = st.integers(16, 5000)


@many
@given(sides, sides, st.sampled_from([512, 768, 1024]), st.sampled_from([8, 32, 64]), st.booleans())
def test_every_image_covers_its_bucket(width, height, side, step, no_upscale):
    options = DataOptions(resolution=(side, side), bucket_reso_steps=step, bucket_no_upscale=no_upscale)
    try:
        placement = place((width, height), options)
    except UsageError:
        assert no_upscale
        return
    assert placement.bucket[0] % step == placement.bucket[1] % step == 0
    assert min(placement.spare) >= 0
    assert placement.bucket[0] * placement.bucket[1] <= (
        _with_rounding(width / height, side) if no_upscale else side * side
    )
    assert not no_upscale or placement.resized[0] <= width
    # One direction fits as tightly as whole pixels allow.
    assert no_upscale or min(placement.spare) <= 1


def test_a_shortest_side_below_the_step_is_the_step():
    options = DataOptions(resolution=(64, 64), min_bucket_reso=8, bucket_reso_steps=32)
    assert limits(options) == (32, 128)
    assert place((1000, 10), options).bucket == (128, 32)


def test_without_buckets_every_image_is_cropped_to_the_resolution():
    options = DataOptions(resolution=(512, 256), enable_bucket=False)
    placement = place((1000, 1000), options)
    assert placement.bucket == (512, 256)
    assert placement.resized == (512, 512)
    assert placement.centre == (0, 128)


def test_too_small_for_a_bucket():
    options = DataOptions(resolution=(512, 512), bucket_no_upscale=True)
    with pytest.raises(UsageError, match="100x40 pixels are too few for a bucket of multiples of 64"):
        place((100, 40), options)


def test_size_conditioning():
    # 1500x1000 has the ratio 1.5; of SDXL's buckets 1216x832 (1.4615) is nearest. It is scaled by
    # 832/1000 to 1248x832, and 16 of the 32 columns too many are cut on the left.
    options = DataOptions(resolution=(1024, 1024))
    placement = place((1500, 1000), options)
    assert placement.bucket == (1216, 832)
    ids = size_ids((1500, 1000), placement, placement.centre, flipped=False)
    assert ids.numbers == (1000, 1500, 0, 16, 832, 1216)


def test_mirroring_swaps_left_and_right_crops():
    placement = place((1500, 1000), DataOptions(resolution=(1024, 1024)))
    assert size_ids((1500, 1000), placement, (10, 0), flipped=True).numbers == (1000, 1500, 0, 22, 832, 1216)
