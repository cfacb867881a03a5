"""lycotool: train, merge, resize, extract, inspect, convert and bake LyCORIS/LoRA adapters.

The names in ``__all__`` are the public interface; each is imported when it is first used, and
none loads torch before it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lycotool.algorithms.base import Reading
    from lycotool.api import bake, convert, extract, inspect, merge, resize, train
    from lycotool.errors import (
        BadInputError,
        CheckError,
        IncompatibleError,
        LycotoolError,
        NumericError,
        OutputError,
        RefusedError,
        ResourceError,
        UnsafeError,
        UsageError,
    )
    from lycotool.ops._merge_options import MergeOptions
    from lycotool.ops._strengths import StrengthOptions
    from lycotool.ops.bake import BakeOptions
    from lycotool.ops.convert import ConvertOptions
    from lycotool.ops.extract import ExtractOptions
    from lycotool.ops.inspect import InspectOptions
    from lycotool.ops.resize import ResizeOptions
    from lycotool.training.options import TrainOptions

#: Where each public name is.
_HOMES = {
    "lycotool.api": ("bake", "convert", "extract", "inspect", "merge", "resize", "train"),
    "lycotool.errors": (
        "BadInputError", "CheckError", "IncompatibleError", "LycotoolError", "NumericError", "OutputError",
        "RefusedError", "ResourceError", "UnsafeError", "UsageError",
    ),
    "lycotool.algorithms.base": ("Reading",),
    "lycotool.ops._merge_options": ("MergeOptions",),
    "lycotool.ops._strengths": ("StrengthOptions",),
    "lycotool.ops.bake": ("BakeOptions",),
    "lycotool.ops.convert": ("ConvertOptions",),
    "lycotool.ops.extract": ("ExtractOptions",),
    "lycotool.ops.inspect": ("InspectOptions",),
    "lycotool.ops.resize": ("ResizeOptions",),
    "lycotool.training.options": ("TrainOptions",),
}  # fmt: skip

__all__ = [
    "BadInputError", "BakeOptions", "CheckError", "ConvertOptions", "ExtractOptions", "IncompatibleError",
    "InspectOptions", "LycotoolError", "MergeOptions", "NumericError", "OutputError", "Reading", "RefusedError",
    "ResizeOptions", "ResourceError", "StrengthOptions", "TrainOptions", "UnsafeError", "UsageError", "__version__",
    "bake", "convert", "extract", "inspect", "merge", "resize", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            import importlib

            value: object = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
