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
from lycotool.errors import OutputError, UsageError
from lycotool.formats.dialects import DIALECTS
from lycotool.io.open import open_store
from lycotool.io.writer import prepare_output
from lycotool.launching import how_many
from lycotool.lazy import torch
from lycotool.ops._adapter import read_adapter
from lycotool.ops._common import check_suffix, default_name, refuse_warnings
from lycotool.ops.convert import ConvertOptions, convert
from lycotool.ops.resize import ResizeOptions, resize
from lycotool.training.observe import Observer, Observers, StepRecord
from lycotool.training.options import TrainOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lycotool.training.memory.choice import MemoryChoice
    from lycotool.training.memory.estimate import MemoryEstimate
    from lycotool.training.saves import Finish
    from lycotool.training.setup import Trainable
    from lycotool.training.targets import TableRow
    from lycotool.training.weights import Loaded

#: Names of ``format`` that need no conversion.
_OWN_FORMATS = ("kohya", "networks.lora", "lycoris.kohya")


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run will do; all that a dry run gives.

    Attributes
    ----------
    family
        ``sd1``, ``sd2`` or ``sdxl``.
    modules
        The module type table.
    processes
        That train together, each on a GPU of its own.
    batch_sizes
        Images of a batch in all processes together, of each part of the data set.
    lrs
        Learning rate by component.
    memory, available
        Bytes that a GPU will hold, estimated, and what it can hold. A run on another device is
        estimated by a dry run only.
    memory_reason
        Why gradient checkpointing is on or off, where the options left it open.
    """

    output: str
    family: str
    prediction: str
    precision: str
    device: str
    modules: tuple[TableRow, ...]
    parameters: int
    images: int
    batches_per_epoch: int
    steps: int
    epochs: int
    seed: int
    processes: int
    batch_sizes: tuple[int, ...]
    lrs: Mapping[str, float]
    gradient_checkpointing: bool
    memory: MemoryEstimate | None
    available: int | None
    memory_reason: str
    dataset: tuple[str, ...]
    warnings: tuple[str, ...]


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
        Make warnings errors, before a step is made.

    Raises
    ------
    UsageError
        If options contradict each other.
    LycotoolError
        As the parts say.
    """
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

    _check_output(options, _output(options), force=force)
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

    output = _output(options)
    state_folder = output.with_name(output.name.removesuffix(".safetensors") + ".state")
    if world.is_main:
        _check_output(options, output, force=force)
    with explained(options):
        ready = prepare(options, load_weights=_load_weights, weightless=dry_run, world=world)
    choice = None
    if dry_run or ready.device.type == "cuda":
        choice = choose_memory(ready)
        ready = choice.ready
    plan = _describe(ready, choice, str(output))
    refuse_warnings(plan.warnings, strict=strict)
    for warning in plan.warnings:
        observer.warning(warning)
    observer.planned(plan)
    for note in ready.notes:
        observer.note(note)
    if dry_run:
        return TrainResult(plan, (), 0, None, None, 0.0, dry_run=True)
    with explained(ready.options, choice):
        return _run(ready, plan, output, state_folder, observer)


def _run(
    ready: Trainable, plan: TrainPlan, output: Path, state_folder: Path, observer: Observer
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
            finish=_finish(options, ready.base.family),
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
    return TrainResult(
        plan=plan,
        outputs=tuple(between.outputs),
        first_step=first_step,
        loss=None if last.record is None else last.record.smoothed_loss,
        validation_loss=between.validation_loss,
        seconds=time.perf_counter() - clock,
        dry_run=False,
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


def _output(options: TrainOptions) -> Path:
    if options.output is not None:
        if options.output == "-":
            raise UsageError("an adapter in training is a file, not standard output")
        return Path(options.output)
    return Path(default_name([options.dataset], f"-{options.network.algo}.safetensors"))


def _check_output(options: TrainOptions, output: Path, *, force: bool) -> None:
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


def _finish(options: TrainOptions, family: str) -> Finish | None:
    """What becomes of the file in kohya's format."""
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


def _describe(ready: Trainable, choice: MemoryChoice | None, output: str) -> TrainPlan:
    from lycotool.training.setup import warnings_of

    table = ready.network.table()
    return TrainPlan(
        output=output,
        family=ready.base.family,
        prediction=ready.base.prediction,
        precision=ready.options.compute.precision,
        device=str(ready.device),
        modules=table,
        parameters=sum(row.parameters for row in table),
        images=ready.dataset.images_per_epoch,
        batches_per_epoch=ready.plan.batches_per_epoch,
        steps=ready.plan.steps,
        epochs=ready.plan.epochs,
        seed=ready.options.length.seed,
        processes=ready.world.size,
        batch_sizes=_batch_sizes(ready),
        lrs=ready.lrs,
        gradient_checkpointing=bool(ready.options.compute.gradient_checkpointing),
        memory=None if choice is None else choice.estimate,
        available=None if choice is None else choice.available,
        memory_reason="" if choice is None else choice.reason,
        dataset=ready.dataset.describe(ready.world.size),
        warnings=(*warnings_of(ready), *([choice.warning] if choice is not None and choice.warning else [])),
    )


def _batch_sizes(ready: Trainable) -> tuple[int, ...]:
    groups = sorted({subset.group for subset in ready.dataset.subsets})
    return tuple(ready.dataset.batch_size_of(group) * ready.world.size for group in groups)


def _optimizer_text(options: TrainOptions, arguments: Mapping[str, object]) -> str:
    """As sd-scripts writes it: ``AdamW(weight_decay=0.1)``."""
    shown = ",".join(f"{name}={value}" for name, value in arguments.items())
    return options.optimizer.optimizer + (f"({shown})" if shown else "")


def as_document(result: TrainResult) -> dict[str, object]:
    """The ``--json`` object."""
    return asdict(result)
