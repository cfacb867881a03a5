"""The training loop.

Each step is a function of the parameters, the optimizer's state and the step's number: every
draw comes from seed, purpose, step and sample (:mod:`lycotool.training.randomness`). So a run
that was stopped goes on bit for bit, and no generator's state is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lycotool.distributed import World
from lycotool.errors import NumericError
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.predict import predict
from lycotool.training.data.latents import LatentCache
from lycotool.training.diagnosis import first_non_finite
from lycotool.training.diffusion import Diffusion
from lycotool.training.inputs import InputMaker, Inputs, conditioning_of
from lycotool.training.loss_scale import SMALLEST, LossScale
from lycotool.training.network import Network
from lycotool.training.observe import Observer, StepRecord
from lycotool.training.optimizers.stepper import Stepper
from lycotool.training.plan import Plan, StepPlan
from lycotool.training.recorder import Recorder
from lycotool.training.schedules import Schedule
from lycotool.training.step import Steps
from lycotool.training.stopping import Stop, held_back

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything the loop works with; nothing of it is replaced while it runs.

    Attributes
    ----------
    captured
        Whether batches of one shape are recorded as a CUDA graph.
    """

    world: World
    base: BaseModel
    network: Network
    plan: Plan
    inputs: InputMaker
    validation_latents: LatentCache | None
    diffusion: Diffusion
    stepper: Stepper
    schedule: Schedule
    scale: LossScale
    recorder: Recorder
    clip_skip: int | None
    max_grad_norm: float
    scale_weight_norms: float | None
    captured: bool = False

    def losses(self, inputs: Inputs) -> Tensor:
        """The weighted loss of every sample, ``(B,)``."""
        noisy, target = self.diffusion.corrupt(inputs.latents, inputs.draws)
        text = conditioning_of(self.base, inputs, self.clip_skip)
        timesteps = inputs.draws.timesteps
        prediction = predict(self.base, noisy, timesteps, text, inputs.size_ids)
        return self.diffusion.loss(prediction, target, timesteps, inputs.weights)

    def lrs(self, step: int) -> dict[str, float]:
        """Learning rate of every group at a step."""
        return {group.name: group.lr * self.schedule.factor(step, group.lr) for group in self.stepper.groups}

    def models(self) -> dict[str, nn.Module]:
        """What may be trained, by component."""
        encoders = {f"te{number}": model for number, model in enumerate(self.base.text_encoders, 1)}
        return {"unet": self.base.unet, **encoders}


class Events(Protocol):
    """What happens between steps: validation, samples, saving."""

    def before(self) -> None:
        """Training begins."""

    def after(self, planned: StepPlan) -> None:
        """A step is done, and the losses up to it are known to be finite where it matters."""

    def is_due(self, planned: StepPlan) -> bool:
        """Whether :meth:`after` has anything to do."""

    def interrupted(self, done: int) -> None:
        """The user stops the run after ``done`` steps."""


def train(run: Run, events: Events, observer: Observer, *, first_step: int = 0) -> None:
    """Train from ``first_step`` to the end of the plan.

    Raises
    ------
    NumericError
        At a loss or gradient that is not finite: with the step, its images, and the layer.
    KeyboardInterrupt
        After Ctrl-C, when the step was complete and ``events`` has saved.
    """
    observer.begin(first_step, run.plan.steps)
    steps = Steps(run, observer.warning)
    with held_back() as stop:
        if first_step == 0:
            events.before()
        for step in range(first_step, run.plan.steps):
            planned = run.plan.at(step)
            loss, norm = steps.take(planned)
            run.recorder.add(
                step=step, epoch=planned.epoch, loss=loss, norm=norm, lr=run.lrs(step), images=planned.samples
            )
            last = step == run.plan.steps - 1
            due = last or run.recorder.is_due or events.is_due(planned)
            stops = _agree(run.world, stop, due=due)
            if stops or due:
                for record in run.recorder.fetch():
                    _check(run, record)
                    observer.step(record)
            if stops and not last:
                events.interrupted(step + 1)
                run.world.barrier()
                break
            if events.is_due(planned):
                events.after(planned)


def _agree(world: World, stop: Stop, *, due: bool) -> bool:
    """Whether the run stops here, in all processes: a signal may have reached only one of them.

    They ask each other at the steps at which they wait for their devices anyway.
    """
    if world.size > 1 and due:
        stop.number = world.largest(stop.number or 0) or None
    return bool(stop) and (world.size == 1 or due)


def _check(run: Run, record: StepRecord) -> None:
    """Stop at a number that is not finite.

    With fp16 a gradient may overflow now and then: the step was left out and the scale lowered.
    """
    expected = run.scale.enabled and run.scale.factor >= SMALLEST
    if math.isfinite(record.loss) and (math.isfinite(record.grad_norm) or expected):
        return
    what = "loss" if not math.isfinite(record.loss) else "norm of the gradients"
    value = record.loss if what == "loss" else record.grad_norm
    planned = run.plan.at(record.step - 1)
    found = run.world.gather(_locate(run, planned))
    files, place = next((pair for pair in found if not pair[1].startswith("no layer")), found[0])
    raise NumericError(
        f"the {what} of step {record.step} is {value}",
        details=[f"images: {', '.join(files)}", f"first seen in {place}"],
        hint="a lower learning rate, `--precision bf16` or fp32, or `--max-grad-norm`; the last saved state is kept",
    )


def _locate(run: Run, planned: StepPlan) -> tuple[list[str], str]:
    """The images of a step, and the layer where a number stops being finite."""
    run.stepper.zero_grad()
    run.network.draw(planned.step)
    first = 0
    files: list[str] = []
    places: list[tuple[str, list[str]]] = []
    for batch in planned.batches:
        inputs = run.inputs.make(batch, step=planned.step, first=first)
        first += len(batch.samples)
        place = first_non_finite(run.models(), lambda inputs=inputs: run.losses(inputs).mean())  # type: ignore[misc]
        files += inputs.files
        places.append((place, list(inputs.files)))
    for place, images in places:
        if not place.startswith("no layer"):
            return images, place
    return files, places[0][0]


def state_of(run: Run) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Raw parameters and the optimizer's state: tensors, and the rest as JSON."""
    tensors = {f"network.{name}": tensor for name, tensor in run.network.raw_state().items()}
    moments, rest = run.stepper.state()
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
    return tensors, {
        "optimizer": rest,
        "loss_scale": run.scale.state(),
        "smoothing": run.recorder.state(),
    }


def load_state(run: Run, tensors: Mapping[str, Tensor], rest: Mapping[str, object]) -> None:
    """Take up what :func:`state_of` gave."""
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    run.network.load_raw_state(parts["network"])
    run.stepper.load_state(parts["optimizer"], rest["optimizer"])  # type: ignore[arg-type]
    run.scale.load_state(rest["loss_scale"])  # type: ignore[arg-type]
    run.recorder.load_state(rest["smoothing"])  # type: ignore[arg-type]
