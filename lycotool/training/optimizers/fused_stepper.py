"""Steps inside the backward pass: each parameter moves when its gradient is complete, and the gradient is gone.

Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"
(LOMO), with any optimizer. The gradients of all parameters are never there together, so
nothing can be done with all of them: no clipping by their norm, no accumulation, no loss scaling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lycotool.errors import BadInputError
from lycotool.lazy import torch
from lycotool.training.optimizers import known as registry
from lycotool.training.optimizers.saved import restore, saved
from lycotool.training.optimizers.stepper import Group, Stepper

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from lycotool.distributed import World


class FusedStepper(Stepper):
    """An optimizer for each parameter; between :meth:`begin` and :meth:`step` gradients move them.

    Parameters
    ----------
    groups, name, arguments
        As :class:`Stepper`'s.
    """

    moves_in_backward = True

    def __init__(self, groups: Sequence[Group], name: str, arguments: Sequence[str] = ()) -> None:
        _, cls, values = registry.chosen(name, arguments)
        self.groups = tuple(groups)
        self.name = name
        self.arguments = values
        self.sets_own_lr = bool(values.get("relative_step"))
        if name.lower() == "adamw":
            values = {"fused": True} | values
        self._optimizers: list[tuple[int, torch.optim.Optimizer]] = []
        self._factors: tuple[float, ...] = ()
        self._square = torch.zeros((), device=groups[0].parameters[0].device)
        for number, group in enumerate(groups):
            for parameter in group.parameters:
                lr = None if self.sets_own_lr else group.lr
                optimizer = cls([parameter], **values, lr=lr)
                self._optimizers.append((number, optimizer))
                parameter.grad = None
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._mover(number, optimizer)
                )
        self.train_mode(True)

    def _mover(self, number: int, optimizer: torch.optim.Optimizer) -> Any:  # noqa: ANN401 - a hook
        """What moves a parameter once its gradient is there."""

        def move(parameter: Parameter) -> None:
            gradient = parameter.grad
            if not self._factors or gradient is None:
                return  # not in a step: somebody looks at gradients
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._square += norm.square()
            torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0).mul_(norm.isfinite())
            if not self.sets_own_lr:
                optimizer.param_groups[0]["lr"] = self.groups[number].lr * self._factors[number]
            optimizer.step()
            parameter.grad = None

        return move

    @property
    def gradients(self) -> list[Tensor]:
        """None: they are gone."""
        return []

    def begin(self, factors: Sequence[float]) -> None:
        """Let gradients move parameters from now on, with these factors on the learning rates."""
        self._square.zero_()
        self._factors = tuple(factors)

    def zero_grad(self) -> None:
        """Forget gradients that moved nothing."""
        for _, optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def reduce(self, world: World, loss: Tensor) -> None:
        """Nothing: one process alone moves parameters so."""

    def norm(self) -> Tensor:
        """The 2-norm of all gradients of this step, on the device."""
        return self._square.sqrt()

    def clip(self, norm: Tensor, limit: float) -> None:
        """Nothing: it is too late for that."""

    def step(self, factors: Sequence[float]) -> None:
        """End the step; gradients move nothing until the next one begins."""
        self._factors = ()

    def train_mode(self, training: bool) -> None:
        """For schedule-free optimizers, whose parameters differ while training."""
        for _, optimizer in self._optimizers:
            change = getattr(optimizer, "train" if training else "eval", None)
            if callable(change):
                change()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON can hold it."""
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for index, (_, optimizer) in enumerate(self._optimizers):
            own, rest[str(index)] = saved(optimizer)
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        return tensors, rest

    def load_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave.

        Raises
        ------
        BadInputError
            If it is not of these parameters.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, key = name.partition(".")
            parts.setdefault(owner, {})[key] = tensor
        if len(rest) != len(self._optimizers):
            raise BadInputError(f"the state has {len(rest)} parameters, the training {len(self._optimizers)}")
        for index, (_, optimizer) in enumerate(self._optimizers):
            restore(optimizer, parts.get(str(index), {}), rest[str(index)])
