"""The files of a training: where they go, what is checked before, and what becomes of them at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.errors import OutputError, UsageError
from lycotool.formats.dialects import DIALECTS
from lycotool.io.writer import prepare_output
from lycotool.ops._common import check_suffix, default_name
from lycotool.ops.convert import ConvertOptions, convert
from lycotool.ops.resize import ResizeOptions, resize
from lycotool.training.options import TrainOptions

if TYPE_CHECKING:
    from lycotool.training.saves import Finish

#: Names of ``format`` that need no conversion.
_OWN_FORMATS = ("kohya", "networks.lora", "lycoris.kohya")


def output_of(options: TrainOptions) -> Path:
    """The adapter's file, named after the data set where no name is given.

    Raises
    ------
    UsageError
        For standard output.
    """
    if options.output is not None:
        if options.output == "-":
            raise UsageError("an adapter in training is a file, not standard output")
        return Path(options.output)
    return Path(default_name([options.dataset], f"-{options.network.algo}.safetensors"))


def check_output(options: TrainOptions, output: Path, *, force: bool) -> None:
    """Refuse an output that cannot be, and options of saving that contradict each other.

    Raises
    ------
    UsageError, OutputError
        As said.
    """
    name = options.save.format
    if name not in _OWN_FORMATS and name not in DIALECTS:
        raise UsageError(f"--format: no such name: {name}", hint="one of kohya, " + ", ".join(DIALECTS))
    if options.save.split_dylora and (options.network.algo != "dylora" or name not in _OWN_FORMATS):
        raise UsageError("--split-dylora is for `--algo dylora` in kohya's format")
    if options.save.resume is not None and options.save.fresh:
        raise UsageError("--resume and --fresh contradict each other")
    inputs = [path for path in (Path(options.base),) if path.is_file()]
    if name not in _OWN_FORMATS and DIALECTS[name].is_folder:
        if output.exists() and not force:
            raise OutputError("exists already", path=output, hint="`--force` replaces it")
        return
    check_suffix(str(output))
    prepare_output(str(output), inputs=inputs, force=force)


def finish_of(options: TrainOptions, family: str) -> Finish | None:
    """What becomes of a file in kohya's format; None where it stays as it is."""
    name = options.save.format
    if options.save.split_dylora:
        unit = options.network.block_size or 4

        def split(draft: Path, target: Path) -> list[str]:
            draft.replace(target)
            folder = ResizeOptions(output=str(target.parent), split=True, unit=unit, force=True)
            done = resize(str(target), folder)
            return [str(target), *done.outputs]

        return split
    if name in _OWN_FORMATS:
        return None

    def converted(draft: Path, target: Path) -> list[str]:
        done = convert(str(draft), ConvertOptions(to=name, arch=family, output=str(target), force=True))
        return [done.output]

    return converted
