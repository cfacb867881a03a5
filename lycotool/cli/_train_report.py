"""What `train` shows: the plan, a bar while it works, the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lycotool.cli._output import Output, human_bytes
from lycotool.cli._report import finish
from lycotool.cli._text import clean
from lycotool.training.observe import Observer, StepRecord

if TYPE_CHECKING:
    from rich.progress import TaskID

    from lycotool.ops._train_plan import TrainPlan
    from lycotool.ops.train import TrainResult

#: Without a terminal: a line each so many per cent.
_SHARE = 5

#: Columns that the bar takes beside the numbers: its label, itself, steps and time.
_BESIDE_NUMBERS = 40


class TrainProgress(Observer):
    """A Rich bar on a terminal; a line now and then elsewhere."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar: Any = None
        self._task: TaskID | None = None
        self._steps = 0
        self._shown = 0

    def __enter__(self) -> TrainProgress:
        on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if on_terminal and not self._out.quiet and not self._out.json:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                # Where there is little room, the bar gives way: not the counts and not the time.
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def planned(self, plan: object) -> None:
        """Show the plan before it begins."""
        for line in plan_lines(plan):  # type: ignore[arg-type]
            self.note(line)

    def start(self, label: str, total: int) -> None:
        """A phase before training."""
        self._new_task(label, total, 0)

    def advance(self, count: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, count)

    def note(self, text: str) -> None:
        """Say it, above the bar."""
        if self._bar is not None and not self._out.quiet:
            self._bar.console.print(clean(text), markup=False, highlight=False, soft_wrap=True)
        else:
            self._out.note(text)

    def warning(self, text: str) -> None:
        """Say it as a warning."""
        self.note(f"lycotool: warning: {text}")

    def begin(self, first_step: int, steps: int) -> None:
        """A bar for the steps."""
        self._steps = steps
        self._new_task("training", steps, first_step)

    def step(self, record: StepRecord) -> None:
        """Loss, smoothed loss, learning rate, images per second, memory."""
        if self._bar is not None and self._task is not None:
            room = self._bar.console.width - _BESIDE_NUMBERS
            self._bar.update(self._task, completed=record.step, numbers=_numbers(record, room))
            return
        share = record.step * 100 // max(1, self._steps) // _SHARE
        if share > self._shown or record.step == self._steps:
            self._shown = share
            self._out.note(f"step {record.step}/{self._steps}: {_numbers(record)}")

    def validated(self, step: int, loss: float) -> None:
        """Say it."""
        self.note(f"step {step}: validation loss {loss:.4f}")

    def sampled(self, step: int, paths: Sequence[str]) -> None:
        """Say it."""
        self.note(f"step {step}: {len(paths) - 1} images in {paths[-1]}")

    def saved(self, step: int, path: str) -> None:
        """Say it."""
        self.note(f"step {step}: saved {path}")

    def _new_task(self, label: str, total: int, done: int) -> None:
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=total, completed=done, numbers="")


def _numbers(record: StepRecord, room: int | None = None) -> str:
    """Loss and whatever else there is room for, the most wanted first."""
    lrs = sorted(set(record.lr.values()), reverse=True)
    parts = [
        f"loss {record.loss:.4f}",
        f"smoothed {record.smoothed_loss:.4f}",
        "lr " + "/".join(f"{lr:.3g}" for lr in lrs),
        f"{record.images_per_second:.2f} images/s",
    ]
    if record.peak_bytes:
        parts.append(human_bytes(record.peak_bytes))
    kept: list[str] = []
    for part in sorted(parts, key=lambda part: not part.startswith(("loss", "lr"))):
        if room is None or not kept or len(", ".join([*kept, part])) <= room:
            kept.append(part)
    return ", ".join(part for part in parts if part in kept)


def plan_lines(plan: TrainPlan) -> list[str]:
    """The plan as lines: base, data, module type table, length, memory."""
    width = max((len(row.algo) for row in plan.modules), default=0)
    table = [
        f"  {row.component:<5} {row.algo:<{width}} {row.modules:>5} modules {row.parameters:>13,} parameters"
        for row in plan.modules
    ]
    rates = ", ".join(f"{component} {lr:g}" for component, lr in plan.lrs.items())
    return [
        f"{plan.family}, {plan.prediction}, {plan.precision} on {plan.device}",
        *plan.dataset,
        *table,
        f"{plan.parameters:,} parameters, learning rate {rates}",
        *_shared(plan),
        f"{plan.steps} steps ({plan.epochs} epochs), seed {plan.seed}",
        *memory_lines(plan),
    ]


def memory_lines(plan: TrainPlan) -> list[str]:
    """What a GPU will hold, as a table, and why gradient checkpointing is on or off."""
    memory = plan.memory
    if memory is None:
        return []
    again = ", computed again for the gradient" if memory.gradient_checkpointing else ""
    rows = {
        "frozen weights": memory.base,
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        f"activations{again}": memory.activations,
        "cached latents": memory.caches,
        "libraries (assumed)": memory.workspace,
    }
    free = "" if plan.available is None else f"; {human_bytes(plan.available)} are free"
    lines = [f"memory while training: {human_bytes(memory.total)}, estimated within 10 %{free}"]
    lines += [f"  {human_bytes(size):>10} {name}" for name, size in rows.items() if size]
    lines.append(f"  {human_bytes(memory.encoding):>10} before training, while images are encoded")
    return [*lines, *([plan.memory_reason] if plan.memory_reason else [])]


def _shared(plan: TrainPlan) -> list[str]:
    """What several processes make of the batch size."""
    if plan.processes == 1:
        return []
    sizes = ", ".join(f"{size} images ({size // plan.processes} each)" for size in plan.batch_sizes)
    return [f"{plan.processes} processes share each batch of {sizes}; learning rates are not scaled"]


def show_train(out: Output, result: TrainResult) -> None:
    """Report a run that is complete, or planned."""
    from lycotool.ops.train import as_document

    if result.dry_run:
        out.note(f"would write {result.plan.output}")
    else:
        size = sum(_size(path) for path in result.outputs)
        done = result.plan.steps - result.first_step
        out.note(f"wrote {human_bytes(size)} after {done} steps in {result.seconds:.0f} s")
    finish(out, as_document(result), result.outputs, dry_run=result.dry_run)


def _size(path: str) -> int:
    file = Path(path)
    if file.is_dir():
        return sum(inner.stat().st_size for inner in file.iterdir())
    return file.stat().st_size
