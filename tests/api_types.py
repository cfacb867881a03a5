"""What type checkers see of the public interface: checked by mypy with the package, never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lycotool
from lycotool import (
    AdapterMergeResult,
    BakeOptions,
    BakeResult,
    ConvertOptions,
    ConvertResult,
    ExtractOptions,
    ExtractResult,
    InspectOptions,
    InspectReport,
    LycotoolError,
    MergeOptions,
    MethodOptions,
    Reading,
    ResizeOptions,
    ResizeResult,
    StrengthOptions,
    TrainOptions,
    UsageError,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type


def every_command(base: Path, options: TrainOptions) -> None:
    merge_options = MergeOptions(
        output="m.safetensors",
        method=MethodOptions(method="ties", density=0.5),
        strengths=StrengthOptions(te=0.5),
        strict=True,
    )
    assert_type(
        lycotool.merge(base, ["a.safetensors:0.8", base], merge_options), BakeResult | AdapterMergeResult
    )
    assert_type(lycotool.bake(base, [base], BakeOptions(reading=Reading(alpha_zero="rank"))), BakeResult)
    assert_type(lycotool.resize("a.safetensors", ResizeOptions(rank=4, dry_run=True)), ResizeResult)
    assert_type(lycotool.extract(base, base, ExtractOptions(algo="lokr", include=("*attn*",))), ExtractResult)
    assert_type(lycotool.inspect(base, "loras", options=InspectOptions(stats=True)), list[InspectReport])
    assert_type(lycotool.convert(base, ConvertOptions(to="diffusers")), ConvertResult)
    assert_type(lycotool.train(options, force=True, strict=True).dry_run, bool)


def every_error(error: LycotoolError) -> None:
    assert_type(error.exit_code, int)
    assert_type(error.hint, str | None)
    assert_type(error.details, tuple[str, ...])
    try:
        raise UsageError("x", hint="y")
    except LycotoolError as caught:
        assert_type(caught, LycotoolError)


def what_is_wrong_is_seen() -> None:
    lycotool.resize("a.safetensors", ResizeOptions(rnk=4))  # type: ignore[call-arg]
    lycotool.convert("a.safetensors")  # type: ignore[call-arg]
    lycotool.merge(1, [])  # type: ignore[arg-type]
