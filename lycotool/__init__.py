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
    from lycotool.ops._merge_adapters import AdapterMergeResult
    from lycotool.ops._merge_options import MergeOptions
    from lycotool.ops._methods import MethodOptions
    from lycotool.ops._strengths import StrengthOptions
    from lycotool.ops.bake import BakeOptions, BakeResult
    from lycotool.ops.convert import ConvertOptions, ConvertResult
    from lycotool.ops.extract import ExtractOptions, ExtractResult
    from lycotool.ops.inspect import InspectOptions, InspectReport
    from lycotool.ops.resize import ResizeOptions, ResizeResult
    from lycotool.training.options import TrainOptions

#: Where each public name is.
_HOMES = {
    "lycotool.api": ("bake", "convert", "extract", "inspect", "merge", "resize", "train"),
    "lycotool.errors": (
        "BadInputError", "CheckError", "IncompatibleError", "LycotoolError", "NumericError", "OutputError",
        "RefusedError", "ResourceError", "UnsafeError", "UsageError",
    ),
    "lycotool.algorithms.base": ("Reading",),
    "lycotool.ops._merge_adapters": ("AdapterMergeResult",),
    "lycotool.ops._merge_options": ("MergeOptions",),
    "lycotool.ops._methods": ("MethodOptions",),
    "lycotool.ops._strengths": ("StrengthOptions",),
    "lycotool.ops.bake": ("BakeOptions", "BakeResult"),
    "lycotool.ops.convert": ("ConvertOptions", "ConvertResult"),
    "lycotool.ops.extract": ("ExtractOptions", "ExtractResult"),
    "lycotool.ops.inspect": ("InspectOptions", "InspectReport"),
    "lycotool.ops.resize": ("ResizeOptions", "ResizeResult"),
    "lycotool.training.options": ("TrainOptions",),
}  # fmt: skip

__all__ = [
    "AdapterMergeResult", "BadInputError", "BakeOptions", "BakeResult", "CheckError", "ConvertOptions",
    "ConvertResult", "ExtractOptions", "ExtractResult", "IncompatibleError", "InspectOptions", "InspectReport",
    "LycotoolError", "MergeOptions", "MethodOptions", "NumericError", "OutputError", "Reading", "RefusedError", "ResizeOptions",
    "ResizeResult", "ResourceError", "StrengthOptions", "TrainOptions", "UnsafeError", "UsageError",
    "__version__",
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
    return sorted(__all__)
