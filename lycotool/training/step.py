"""One optimizer step: gradients of every batch, then the parameters' change.

Adding a batch's gradients is nearly all of the work, and it touches only memory that stays
where it is: the network's parameters and gradients, and here the step's loss. So on a GPU it is
recorded once for each shape of a batch and replayed (:mod:`lycotool.training.graphs`); the
first steps, and every step elsewhere, run the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.training.bases.eight_bit import rebuilt_for_gradients
from lycotool.training.graphs import Captured
from lycotool.training.inputs import Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.training.loop import Run
    from lycotool.training.plan import StepPlan


class Steps:
    """Takes the optimizer steps of a run.

    Parameters
    ----------
    note
        Told why batches are not recorded, where they are to be and cannot.
    """

    def __init__(self, run: Run, note: Callable[[str], None]) -> None:
        self._run = run
        device = run.base.device
        self._loss = torch.zeros((), device=device)
        self._samples = torch.ones((), device=device)
        self._gradients: Callable[[Inputs], None] = self._add_gradients
        if run.captured:
            self._gradients = Captured(self._add_gradients, device=device, note=note)

    def take(self, planned: StepPlan) -> tuple[Tensor, Tensor]:
        """Take a step. Gives its loss and the gradients' norm, on the device."""
        run = self._run
        factors = [run.schedule.factor(planned.step, group.lr) for group in run.stepper.groups]
        run.stepper.begin(factors)
        run.network.draw(planned.step)
        self._loss.zero_()
        self._samples.fill_(planned.samples)
        first = 0
        for batch in planned.batches:
            self._gradients(run.inputs.make(batch, step=planned.step, first=first))
            first += len(batch.samples)
        run.stepper.reduce(run.world, self._loss)
        norm, allowed = run.scale.unscale(run.stepper)
        if allowed:
            run.stepper.clip(norm, run.max_grad_norm)
            run.stepper.step(factors)
            if run.scale_weight_norms is not None:
                run.network.max_norm(run.scale_weight_norms)
        return self._loss.clone(), norm

    def _add_gradients(self, inputs: Inputs) -> None:
        """Add the gradients of a batch to the parameters', and its share to the loss."""
        run = self._run
        with ExitStack() as stack:
            for model in run.models().values():
                stack.enter_context(rebuilt_for_gradients(model))
            if not run.stepper.moves_in_backward:  # which needs each parameter's gradient when it is complete
                stack.enter_context(run.network.prepared())
            share = run.losses(inputs).sum() / self._samples
            torch.autograd.backward(run.scale.scaled(share))
        self._loss += share.detach()
