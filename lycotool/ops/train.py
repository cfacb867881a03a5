"""train: an adapter of any algorithm, from a base model and captioned images."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.devices import resolve_device
from lycotool.distributed import World, joined, launched
from lycotool.errors import IncompatibleError, UsageError
from lycotool.io.nearest import nearest_file
from lycotool.io.open import open_store
from lycotool.launching import how_many
from lycotool.lazy import torch
from lycotool.ops._adapter import read_adapter
from lycotool.ops._common import refuse_warnings
from lycotool.ops._train_output import check_output, finish_of, output_of
from lycotool.ops._train_plan import TrainPlan, plan_of
from lycotool.training.observe import Observer, Observers, StepRecord
from lycotool.training.options import TrainOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lycotool.training.setup import Trainable
    from lycotool.training.weights import Loaded


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a run.

    Attributes
    ----------
    outputs
        The finished adapter, and what was split from it.
    first_step
        Steps that were done before, in the run that was resumed.
    """

    plan: TrainPlan
    outputs: tuple[str, ...]
    first_step: int
    loss: float | None
    validation_loss: float | None
    seconds: float
    dry_run: bool


class _Last(Observer):
    """Remembers the last record."""

    record: StepRecord | None = None

    def step(self, record: StepRecord) -> None:
        self.record = record


def train(
    options: TrainOptions,
    *,
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    observer: Observer | None = None,
) -> TrainResult:
    """Train an adapter.

    In a process of several that were started together (:mod:`lycotool.distributed`), train with the
    others; rank 0 alone writes and reports, and its result names the files.

    Parameters
    ----------
    force
        Replace an existing output.
    dry_run
        Read base and data, plan, and write nothing.
    strict
        Make warnings errors: before a step is made, those there are; at the end, values of the finished
        adapter that its dtype does not hold. It is written all the same: hours of training are in it.

    Raises
    ------
    UsageError
        If options contradict each other.
    LycotoolError
        As the parts say.
    """
    if launched() is None:
        _look_first(options, force=force)
    count = 1 if launched() is not None else processes(options)
    if dry_run and launched() is None:
        world = World(0, count, resolve_device(options.compute.device))
        told = observer or Observer()
        return _train(options, world, force=force, dry_run=True, strict=strict, observer=told)
    if count > 1:
        raise UsageError(
            "a function is called in one process; --gpus is of the command line",
            hint=f"`torchrun --nproc-per-node {count} SCRIPT` starts several",
        )
    with joined(options.compute.device) as world:
        told = observer if observer is not None and world.is_main else Observer()
        return _train(options, world, force=force, dry_run=dry_run, strict=strict, observer=told)


def _look_first(options: TrainOptions, *, force: bool) -> None:
    """Say what is wrong with names, output, base or data set before torch and the libraries are imported.

    That takes several seconds; this reads the base's header and no more.

    Raises
    ------
    LycotoolError
        As :func:`train` does.
    """
    _check_names(options)
    check_output(options, output_of(options), force=force)
    if not Path(options.dataset).exists():
        raise UsageError("no such file or folder", path=options.dataset, hint=nearest_file(options.dataset))
    if options.base != "-":  # which can be read once
        with open_store(options.base):
            pass


def processes(options: TrainOptions) -> int:
    """How many processes train together: those there are already, or that are to be started.

    Raises
    ------
    UsageError
        If there are not so many GPUs, or the launcher and the options differ.
    """
    place, wanted = launched(), options.compute.gpus
    if place is None:
        return how_many(wanted, options.compute.device)
    here = os.environ.get("LOCAL_WORLD_SIZE", str(place.size))
    if wanted not in ("1", "auto", here, str(place.size)):
        raise UsageError(
            f"--gpus {wanted} in one of {place.size} processes that were launched together",
            hint="leave one of both away",
        )
    return place.size


def check(options: TrainOptions, *, force: bool) -> None:
    """Refuse what can be seen to be wrong before processes are started and models are read.

    Raises
    ------
    LycotoolError
        As :func:`train` does.
    """
    _check_names(options)
    require_libraries()
    from lycotool.training.checks import check_options
    from lycotool.training.presets import read_preset

    check_output(options, output_of(options), force=force)
    for path in (options.base, options.dataset):
        if not Path(path).exists():
            raise UsageError("no such file or folder", path=path)
    read_preset(options.network.preset)
    check_options(options)


def _train(
    options: TrainOptions, world: World, *, force: bool, dry_run: bool, strict: bool, observer: Observer
) -> TrainResult:
    _check_names(options)
    require_libraries()
    processes(options)
    from lycotool.training.memory.choice import choose_memory
    from lycotool.training.memory.exhausted import explained
    from lycotool.training.setup import prepare

    output = output_of(options)
    state_folder = output.with_name(output.name.removesuffix(".safetensors") + ".state")
    if world.is_main:
        check_output(options, output, force=force)
    with explained(options):
        ready = prepare(options, load_weights=_load_weights, weightless=dry_run, world=world)
    choice = None
    if dry_run or ready.device.type == "cuda":
        choice = choose_memory(ready)
        ready = choice.ready
    plan = plan_of(ready, choice, str(output))
    refuse_warnings(plan.warnings, strict=strict)
    for warning in plan.warnings:
        observer.warning(warning)
    observer.planned(plan)
    for note in ready.notes:
        observer.note(note)
    if dry_run:
        return TrainResult(plan, (), 0, None, None, 0.0, dry_run=True)
    with explained(ready.options, choice):
        return _run(ready, plan, output, state_folder, observer, strict=strict)


def _run(
    ready: Trainable, plan: TrainPlan, output: Path, state_folder: Path, observer: Observer, *, strict: bool
) -> TrainResult:
    from lycotool.training import continuity
    from lycotool.training.assemble import make_images, make_run, make_validation
    from lycotool.training.between import Between
    from lycotool.training.loop import load_state
    from lycotool.training.loop import train as loop
    from lycotool.training.metadata import RunMetadata, now
    from lycotool.training.saves import Saver
    from lycotool.training.state import read_state

    options = ready.options
    started, clock = now(), time.perf_counter()
    world = ready.world
    identity = continuity.identity(options, ready.base, ready.dataset, ranks=world.size)
    folder = world.share(_resumed_from(options, state_folder))
    state = None
    if folder is not None:
        state = read_state(folder)
        continuity.check(state.rest.get("identity", {}), identity, folder)
        if state.step >= ready.plan.steps:
            raise UsageError(
                f"the state is after step {state.step}, the run has {ready.plan.steps}",
                path=folder,
                hint="`--steps` of more goes on, `--fresh` starts anew",
            )
    first_step = 0 if state is None else state.step
    with ExitStack() as closing:
        last = _Last()
        observers = Observers(observer, last, *(_logs(options, first_step, closing) if world.is_main else ()))
        run = make_run(ready, observers)
        metadata = RunMetadata(
            options,
            ready.base,
            ready.plan,
            labels=[row.algo for row in plan.modules],
            lrs=ready.lrs,
            optimizer=_optimizer_text(options, run.stepper.arguments),
            started=started,
            title=output.name.removesuffix(".safetensors"),
        )
        saver = Saver(
            ready.network,
            metadata,
            output,
            dtype=options.save.save_dtype,
            keep=options.save.keep_saves,
            finish=finish_of(options, ready.base.family),
            warn=observers.warning,
        )
        between = Between(
            run,
            observers,
            saver,
            save=options.save,
            when_validated=options.validation,
            when_sampled=options.samples,
            validation=make_validation(ready, run),
            images=make_images(ready, run, output),
            state_folder=state_folder,
            identity=identity,
        )
        if state is not None:
            load_state(run, state.tensors, state.rest)
            saver.written = [list(paths) for paths in state.rest.get("saves", [])]
            observer.note(f"going on after step {first_step}")
        loop(run, between, observers, first_step=first_step)
    if strict:
        _refuse_lost(world.share(saver.lost), output)
    return TrainResult(
        plan=plan,
        outputs=tuple(between.outputs),
        first_step=first_step,
        loss=None if last.record is None else last.record.smoothed_loss,
        validation_loss=between.validation_loss,
        seconds=time.perf_counter() - clock,
        dry_run=False,
    )


def _refuse_lost(lost: Sequence[str], output: Path) -> None:
    """What ``--strict`` says of a finished adapter: all processes end alike.

    Raises
    ------
    IncompatibleError
        If values vanished in it.
    """
    if lost:
        raise IncompatibleError(
            "`--strict` makes warnings errors; the adapter is written all the same",
            path=output,
            details=list(lost),
            hint="`--save-dtype bf16` and `--save-dtype fp32` have the range",
        )


def _check_names(options: TrainOptions) -> None:
    """Refuse a mistyped optimizer or preset before anything is loaded.

    Raises
    ------
    UsageError
        With the nearest name.
    """
    from lycotool.training.optimizers.known import find
    from lycotool.training.presets import read_preset

    find(options.optimizer.optimizer)
    read_preset(options.network.preset)


def require_libraries() -> None:
    """Refuse to start without the libraries that models are built from.

    Raises
    ------
    UsageError
        With the ``pip`` command.
    """
    import importlib.util

    missing = [
        name for name in ("diffusers", "transformers", "PIL") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}", hint="`pip install 'lycotool[train]'`")


def _resumed_from(options: TrainOptions, state_folder: Path) -> Path | None:
    from lycotool.training.state import has_state

    if options.save.resume is not None:
        return Path(options.save.resume)
    return state_folder if not options.save.fresh and has_state(state_folder) else None


def _logs(options: TrainOptions, first_step: int, closing: ExitStack) -> list[Observer]:
    from lycotool.training.logs import JsonLog, TensorBoardLog

    logs: list[Observer] = []
    if options.log.log_file is not None:
        logs.append(JsonLog(options.log.log_file, first_step=first_step))
    if options.log.tensorboard is not None:
        logs.append(TensorBoardLog(options.log.tensorboard, first_step=first_step))
    for log in logs:
        closing.callback(log.close)
    return logs


def _load_weights(path: str) -> dict[str, Loaded]:
    """The modules of an adapter file, in float32."""
    from lycotool.training.weights import Loaded

    with open_store(path) as store:
        adapter = read_adapter(store)
        adapter.require_sound()
        device = torch.device("cpu")
        return {
            name: Loaded(module.detected, adapter.load(module, device, torch.float32))
            for name, module in adapter.modules.items()
        }


def _optimizer_text(options: TrainOptions, arguments: Mapping[str, object]) -> str:
    """As sd-scripts writes it: ``AdamW(weight_decay=0.1)``."""
    shown = ",".join(f"{name}={value}" for name, value in arguments.items())
    return options.optimizer.optimizer + (f"({shown})" if shown else "")


def as_document(result: TrainResult) -> dict[str, object]:
    """The ``--json`` object."""
    return asdict(result)
