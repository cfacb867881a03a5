"""The commands as functions, for programs; importing this loads no torch.

Inputs are what the command line takes: a path, with its strength where one belongs
(``"style.safetensors:0.8"``). Options are frozen dataclasses, results those that ``--json``
prints. What the command line ends with an exit code for is raised as a
:class:`lycotool.errors.LycotoolError`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lycotool.ops._adapter import AdapterInput
    from lycotool.ops._merge_adapters import AdapterMergeResult
    from lycotool.ops._merge_options import MergeOptions
    from lycotool.ops.bake import BakeOptions, BakeResult
    from lycotool.ops.convert import ConvertOptions, ConvertResult
    from lycotool.ops.extract import ExtractOptions, ExtractResult
    from lycotool.ops.inspect import InspectOptions, InspectReport
    from lycotool.ops.resize import ResizeOptions, ResizeResult
    from lycotool.ops.train import TrainResult
    from lycotool.training.options import TrainOptions

#: A path, or the text of one.
Path = str | os.PathLike[str]


def merge(
    base: Path, adapters: Sequence[Path], options: MergeOptions | None = None
) -> BakeResult | AdapterMergeResult:
    """Merge adapters into a checkpoint, or adapters into one adapter.

    >>> from lycotool import MergeOptions, merge
    >>> result = merge(
    ...     "tests/data/lora.safetensors:0.6", ["tests/data/loha.safetensors:0.4"],
    ...     MergeOptions(output="both.safetensors", dry_run=True),
    ... )
    >>> result.modules, result.method
    (354, 'exact')

    Raises
    ------
    LycotoolError
        As `lycotool merge` does.
    """
    from lycotool.ops._merge_options import MergeOptions
    from lycotool.ops.merge import merge as run

    return run(_weighted(base), [_weighted(adapter) for adapter in adapters], options or MergeOptions())


def bake(checkpoint: Path, adapters: Sequence[Path], options: BakeOptions | None = None) -> BakeResult:
    """Fold adapters of any algorithm into a checkpoint.

    >>> from lycotool import BakeOptions, bake
    >>> bake(
    ...     "tests/data/base.safetensors", ["tests/data/lora.safetensors:0.8"],
    ...     BakeOptions(output="baked.safetensors", dry_run=True),
    ... ).changed
    354

    Raises
    ------
    LycotoolError
        As `lycotool bake` does.
    """
    from lycotool.ops.bake import BakeOptions
    from lycotool.ops.bake import bake as run

    return run(os.fspath(checkpoint), [_weighted(adapter) for adapter in adapters], options or BakeOptions())


def resize(adapter: Path, options: ResizeOptions) -> ResizeResult:
    """Shrink an adapter's ranks.

    >>> from lycotool import ResizeOptions, resize
    >>> resize("tests/data/lora.safetensors", ResizeOptions(rank=2, dry_run=True)).outputs
    ('lora-r2.safetensors',)

    Raises
    ------
    LycotoolError
        As `lycotool resize` does.
    """
    from lycotool.ops.resize import resize as run

    return run(os.fspath(adapter), options)


def extract(base: Path, tuned: Path, options: ExtractOptions | None = None) -> ExtractResult:
    """Write the difference of two checkpoints as an adapter.

    >>> from lycotool import IncompatibleError, extract
    >>> try:
    ...     extract("tests/data/base.safetensors", "tests/data/lora.safetensors")
    ... except IncompatibleError as error:
    ...     print(error.message)
    this is an adapter; `extract` subtracts checkpoints

    Raises
    ------
    LycotoolError
        As `lycotool extract` does.
    """
    from lycotool.ops.extract import ExtractOptions
    from lycotool.ops.extract import extract as run

    return run(os.fspath(base), os.fspath(tuned), options or ExtractOptions())


def inspect(*names: Path, options: InspectOptions | None = None) -> list[InspectReport]:
    """Say what files are; folders and patterns stand for the models in them.

    >>> from lycotool import inspect
    >>> [report.components for report in inspect("tests/data/loha.safetensors")]
    [{'TE1': 72, 'UNet/DiT': 282}]

    Raises
    ------
    LycotoolError
        As `lycotool inspect` does, for the first file that cannot be read.
    """
    from lycotool.ops.inspect import expand
    from lycotool.ops.inspect import inspect as run

    return [run(name, options) for name in expand([os.fspath(name) for name in names])]


def convert(adapter: Path, options: ConvertOptions) -> ConvertResult:
    """Write an adapter in another program's format.

    >>> from lycotool import ConvertOptions, convert
    >>> convert("tests/data/lora.safetensors", ConvertOptions(to="comfyui", dry_run=True)).output
    'lora.comfyui.safetensors'

    Raises
    ------
    LycotoolError
        As `lycotool convert` does.
    """
    from lycotool.ops.convert import convert as run

    return run(os.fspath(adapter), options)


def train(
    options: TrainOptions, *, force: bool = False, dry_run: bool = False, strict: bool = False
) -> TrainResult:
    """Train an adapter. Needs the extra ``train``.

    Raises
    ------
    LycotoolError
        As `lycotool train` does.
    """
    from lycotool.ops.train import train as run

    return run(options, force=force, dry_run=dry_run, strict=strict)


def _weighted(text: Path) -> AdapterInput:
    from lycotool.ops._inputs import parse_input

    return parse_input(os.fspath(text), methods=True)
