"""Options: each is described, each refuses what it cannot mean."""

from __future__ import annotations

from dataclasses import fields

import pytest

from lycotool.errors import UsageError
from lycotool.training.data.options import NATIVE_RESOLUTION, DataOptions, levels, parse_resolution


@pytest.mark.parametrize("entry", fields(DataOptions), ids=lambda entry: entry.name)
def test_every_option_is_described(entry):
    assert entry.metadata["help"].endswith(".")
    assert entry.metadata["panel"] in {"Data", "Buckets", "Captions", "Images", "Caches"}
    assert entry.metadata["level"] in {"run", "dataset", "subset"}


def test_levels_are_those_of_sd_scripts():
    """docs/config_README-en.md: what belongs to a dataset and not to a subset."""
    datasets = {name for name, level in levels().items() if level == "dataset"}
    assert datasets == {
        "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso",
        "min_bucket_reso", "resolution", "validation_split", "validation_seed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_repeats", 0, "at least 1"),
        ("prior_loss_weight", -1.0, "a number of at least 0"),
        ("prior_loss_weight", float("nan"), "a number of at least 0"),
        ("validation_split", 1.0, "at least 0 and less than 1"),
        ("resolution", (0, 512), "at least 1 pixel"),
        ("batch_size", 0, "at least 1"),
        ("min_bucket_reso", 0, "at least 1 pixel"),
        ("max_bucket_reso", -64, "at least 1 pixel"),
        ("bucket_reso_steps", 20, "a multiple of 8, the VAE's scale"),
        ("caption_extension", ".", "a suffix such as `.txt`"),
        ("caption_extension", "./txt", "a suffix such as `.txt`"),
        ("caption_extension", "captions/.txt", "a suffix such as `.txt`"),
        ("caption_separator", "", "some text"),
        ("keep_tokens", -1, "at least 0"),
        ("caption_dropout_rate", 1.5, "0 to 1"),
        ("caption_dropout_every_n_epochs", -1, "at least 0"),
        ("caption_tag_dropout_rate", -0.1, "0 to 1"),
        ("token_warmup_min", -1, "at least 0"),
        ("token_warmup_step", -1, "at least 0"),
        ("max_token_length", 77, "75, 150 or 225"),
        ("resize_interpolation", "cubic", "one of lanczos, bicubic, bilinear, box, area, nearest"),
        ("cache_latents", "gpu", "one of memory, disk, none"),
        ("cache_text", "gpu", "one of memory, disk, none"),
    ],
)
def test_values_out_of_range(name, value, expected):
    with pytest.raises(UsageError) as error:
        DataOptions(**{name: value})
    shown = f"`{value}`" if isinstance(value, str) else str(value)
    assert error.value.message == f"`{name}` is {shown}, expected {expected}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (512, 128)}, "`min_bucket_reso` is 256, more than the resolution's 128"),
        (
            {"resolution": (512, 512), "max_bucket_reso": 448},
            "`max_bucket_reso` is 448, less than the resolution's 512",
        ),
        (
            {"resolution": (500, 512), "enable_bucket": False},
            "without buckets its sides must be multiples of 8",
        ),
        (
            {"resolution": (32, 32), "min_bucket_reso": 8},
            "`bucket_reso_steps` is 64, more than the resolution's 32",
        ),
        ({"cache_dir": "x"}, "`cache_dir` has no effect: nothing is cached on disk"),
        ({"cache_latents": "disk", "random_crop": True}, "`random_crop` leaves nothing to cache on disk"),
    ],
)
def test_options_that_contradict_each_other(changes, message):
    with pytest.raises(UsageError, match=message):
        DataOptions(**changes)


def test_bucket_limits_are_rounded_as_sd_scripts_does():
    DataOptions(resolution=(512, 512), min_bucket_reso=570, bucket_reso_steps=64)  # 570 -> 512
    DataOptions(resolution=(512, 512), max_bucket_reso=500, bucket_reso_steps=64)  # 500 -> 512


def test_limits_do_not_count_without_upscaling():
    DataOptions(resolution=(128, 128), bucket_no_upscale=True)


@pytest.mark.parametrize(("family", "side"), NATIVE_RESOLUTION.items())
def test_a_family_has_its_own_resolution(family, side):
    assert DataOptions().for_family(*family).resolution == (side, side)
    assert DataOptions(resolution=(640, 448)).for_family(*family).resolution == (640, 448)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", (512, 512)), ("768,512", (768, 512)), ("768x512", (768, 512)), ("768X512", (768, 512))],
)
def test_resolutions_as_text(text, size):
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "big", "1,2,3", "512,"])
def test_texts_that_are_no_resolution(text):
    with pytest.raises(UsageError, match="expected a number of pixels, or width and height"):
        parse_resolution(text)


@pytest.mark.parametrize(
    ("changes", "name", "cure"),
    [
        ({"keep_tokens": 2}, "keep_tokens", {"shuffle_caption": True}),
        ({"keep_tokens": 2}, "keep_tokens", {"caption_tag_dropout_rate": 0.1}),
        ({"keep_tokens": 2}, "keep_tokens", {"token_warmup_step": 10}),
        ({"token_warmup_min": 2}, "token_warmup_min", {"token_warmup_step": 10}),
        ({"validation_seed": 2}, "validation_seed", {"validation_split": 0.1}),
        ({"enable_bucket": False, "bucket_no_upscale": True}, "bucket_no_upscale", {"enable_bucket": True}),
        ({"enable_bucket": False, "bucket_reso_steps": 32}, "bucket_reso_steps", {"enable_bucket": True}),
        ({"enable_bucket": False, "min_bucket_reso": 128}, "min_bucket_reso", {"enable_bucket": True}),
        (
            {"bucket_no_upscale": True, "max_bucket_reso": 900},
            "max_bucket_reso",
            {"bucket_no_upscale": False},
        ),
    ],
)
def test_options_without_effect_are_named(changes, name, cure):
    (sentence,) = DataOptions(**changes).idle()
    assert sentence.startswith(f"`{name}` has no effect: ")
    assert DataOptions(**(changes | cure)).idle() == []


def test_defaults_are_never_idle():
    assert DataOptions().idle() == []
    assert DataOptions(cache_dir="x", cache_text="disk").cache_dir == "x"
