"""Which values of the data options are refused, and which change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lycotool.errors import UsageError

if TYPE_CHECKING:
    from lycotool.training.data.options import DataOptions


def check_ranges(options: DataOptions) -> None:
    """Refuse a value out of its range.

    Raises
    ------
    UsageError
        Naming the option, its value and what is expected.
    """
    for name, (accepts, demand) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not accepts(value):
            raise UsageError(f"`{name}` is {_shown(value)}, expected {demand}")


def _shown(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value)


def _rate(value: float) -> bool:
    return 0 <= value <= 1


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_repeats": (lambda n: n >= 1, "at least 1"),
    "prior_loss_weight": (lambda w: 0 <= w < float("inf"), "a number of at least 0"),
    "validation_split": (lambda part: 0 <= part < 1, "at least 0 and less than 1"),
    "resolution": (lambda size: min(size) >= 1, "at least 1 pixel"),
    "batch_size": (lambda n: n >= 1, "at least 1"),
    "min_bucket_reso": (lambda n: n >= 1, "at least 1 pixel"),
    "bucket_reso_steps": (lambda n: n >= 8 and n % 8 == 0, "a multiple of 8, the VAE's scale"),
    "caption_extension": (
        lambda text: text.strip(". ") != "" and not {"/", "\\"} & set(text),
        "a suffix such as `.txt`",
    ),
    "caption_separator": (lambda text: text != "", "some text"),
    "keep_tokens": (lambda n: n >= 0, "at least 0"),
    "caption_dropout_rate": (_rate, "0 to 1"),
    "caption_dropout_every_n_epochs": (lambda n: n >= 0, "at least 0"),
    "caption_tag_dropout_rate": (_rate, "0 to 1"),
    "token_warmup_min": (lambda n: n >= 0, "at least 0"),
    "token_warmup_step": (lambda n: 0 <= n < float("inf"), "at least 0"),
    "max_token_length": (lambda n: n in (75, 150, 225), "75, 150 or 225"),
    "max_bucket_reso": (lambda n: n >= 1, "at least 1 pixel"),
    "resize_interpolation": (
        lambda name: name in ("lanczos", "bicubic", "bilinear", "box", "area", "nearest"),
        "one of lanczos, bicubic, bilinear, box, area, nearest",
    ),
    "cache_latents": (lambda place: place in ("memory", "disk", "none"), "one of memory, disk, none"),
    "cache_text": (lambda place: place in ("memory", "disk", "none"), "one of memory, disk, none"),
}


def check_buckets(options: DataOptions) -> None:
    """Refuse limits that leave no bucket for the resolution itself."""
    if options.resolution is None:
        return
    width, height = options.resolution
    if not options.enable_bucket:
        if width % 8 or height % 8:
            raise UsageError(
                f"`resolution` is {width}x{height}; without buckets its sides must be multiples of 8",
                hint=f"the next is {-(-width // 8) * 8}x{-(-height // 8) * 8}",
            )
        return
    step = options.bucket_reso_steps
    if min(width, height) < step:
        raise UsageError(
            f"`bucket_reso_steps` is {step}, more than the resolution's {min(width, height)}",
            hint=f"give `bucket_reso_steps` {max(1, min(width, height) // 16) * 8}, or switch `enable_bucket` off",
        )
    if options.bucket_no_upscale:
        return
    low = options.min_bucket_reso - options.min_bucket_reso % step
    if min(width, height) < low:
        raise UsageError(
            f"`min_bucket_reso` is {options.min_bucket_reso}, more than the resolution's {min(width, height)}",
            hint=f"such as `min_bucket_reso` {max(step, min(width, height) // 2 // step * step)}",
        )
    limit = options.max_bucket_reso
    if limit is not None and max(width, height) > limit + -limit % step:
        raise UsageError(
            f"`max_bucket_reso` is {options.max_bucket_reso}, less than the resolution's {max(width, height)}",
            hint="leave it out for twice the resolution",
        )


def idle_options(options: DataOptions) -> list[str]:
    """Options that are set and change nothing beside the others; one sentence each."""
    moves = options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0
    conditions = {
        "keep_tokens": (moves, "no tag is moved or left out"),
        "token_warmup_min": (options.token_warmup_step > 0, "`token_warmup_step` is 0"),
        "validation_seed": (options.validation_split > 0, "`validation_split` is 0"),
        "bucket_no_upscale": (options.enable_bucket, "there are no buckets"),
        "bucket_reso_steps": (options.enable_bucket, "there are no buckets"),
    }
    for name in ("min_bucket_reso", "max_bucket_reso"):
        makes = options.enable_bucket and not options.bucket_no_upscale
        reason = "buckets follow the images" if options.enable_bucket else "there are no buckets"
        conditions[name] = (makes, reason)
    defaults = {entry.name: entry.default for entry in fields(options)}
    return [
        f"`{name}` has no effect: {reason}"
        for name, (used, reason) in conditions.items()
        if not used and getattr(options, name) != defaults[name]
    ]
