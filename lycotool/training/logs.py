"""Logs on disk: JSON lines, and TensorBoard's event files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lycotool.errors import OutputError, UsageError
from lycotool.training.observe import Observer, StepRecord


class JsonLog(Observer):
    """One JSON object per line: ``event`` and what belongs to it.

    A resumed run goes on with the file: lines of steps that are trained again are dropped.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """

    def __init__(self, path: str, *, first_step: int) -> None:
        file = Path(path)
        kept = _until(file, first_step) if first_step else ""
        try:
            self._file: TextIO = file.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", path=path) from None
        self._file.write(kept)

    def begin(self, first_step: int, steps: int) -> None:
        """Write it down."""
        self._line("begin", step=first_step, steps=steps)

    def step(self, record: StepRecord) -> None:
        """Write it down."""
        self._line("step", **dataclasses.asdict(record))

    def validated(self, step: int, loss: float) -> None:
        """Write it down."""
        self._line("validation", step=step, loss=loss)

    def sampled(self, step: int, paths: Sequence[str]) -> None:
        """Write it down."""
        self._line("samples", step=step, paths=list(paths))

    def saved(self, step: int, path: str) -> None:
        """Write it down."""
        self._line("save", step=step, path=path)

    def warning(self, text: str) -> None:
        """Write it down."""
        self._line("warning", text=text)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, event: str, **values: Any) -> None:  # noqa: ANN401 - whatever JSON holds
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"event": event, **finite}, ensure_ascii=False) + "\n")
        self._file.flush()


def _until(file: Path, step: int) -> str:
    """The lines of an earlier run, up to this step."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return ""
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed
            continue
        if entry.get("step", 0) <= step:
            kept.append(line)
    return "".join(kept)


class TensorBoardLog(Observer):
    """Loss, learning rates, validation loss and sample grids, for TensorBoard.

    Raises
    ------
    UsageError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: str, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--tensorboard needs TensorBoard", hint="pip install tensorboard") from None
        self._writer: Any = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)

    def step(self, record: StepRecord) -> None:
        """Write it down."""
        self._writer.add_scalar("loss/step", record.loss, record.step)
        self._writer.add_scalar("loss/smoothed", record.smoothed_loss, record.step)
        self._writer.add_scalar("gradient/norm", record.grad_norm, record.step)
        for name, lr in record.lr.items():
            self._writer.add_scalar(f"lr/{name}", lr, record.step)

    def validated(self, step: int, loss: float) -> None:
        """Write it down."""
        self._writer.add_scalar("loss/validation", loss, step)

    def sampled(self, step: int, paths: Sequence[str]) -> None:
        """Write it down."""
        import numpy as np
        from PIL import Image

        with Image.open(paths[-1]) as grid:
            self._writer.add_image("samples", np.asarray(grid.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
