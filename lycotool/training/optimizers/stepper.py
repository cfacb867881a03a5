"""The optimizer of a run: groups with learning rates, gradient clipping, one step, its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lycotool.distributed import World
from lycotool.errors import UsageError
from lycotool.lazy import torch
from lycotool.training.optimizers import known as registry
from lycotool.training.optimizers.flat import collect, flatten, room
from lycotool.training.optimizers.saved import restore, saved

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with one learning rate; ``name`` says whose they are."""

    name: str
    lr: float
    parameters: tuple[Parameter, ...]


class Stepper:
    """Moves the parameters of some groups by an optimizer.

    Gradients are allocated once, in one buffer, and stay where they are. For an optimizer that works
    element by element, a group's parameters are views of one buffer, too.

    Parameters
    ----------
    groups
        Not empty; all on one device.
    name, arguments
        See :mod:`lycotool.training.optimizers.known` and ``arguments``.

    Raises
    ------
    UsageError
        If there is no such optimizer, an argument is unknown, or it cannot have these groups.
    """

    #: Whether parameters move inside the backward pass.
    moves_in_backward = False

    def __init__(self, groups: Sequence[Group], name: str, arguments: Sequence[str] = ()) -> None:
        entry, cls, values = registry.chosen(name, arguments)
        self.groups = tuple(groups)
        self.name = name
        self.arguments = values
        self.sets_own_lr = bool(values.get("relative_step"))
        device = groups[0].parameters[0].device
        rooms = [self._room(group) for group in groups]
        dtype = groups[0].parameters[0].dtype
        #: All gradients, and a place for the loss.
        self._whole = torch.zeros(sum(rooms) + 1, dtype=dtype, device=device)
        self._tensors = [
            self._hold(group, gradient, elementwise=entry.elementwise)
            for group, gradient in zip(groups, torch.split(self._whole[:-1], rooms), strict=True)
        ]
        if name.lower() == "prodigy" and len({group.lr for group in groups if group.lr}) > 1:
            raise UsageError(
                "prodigy finds one step size, so all learning rates must be equal",
                hint="leave `--unet-lr`, `--te-lr` and LoRA+ ratios away; 0 freezes a part",
            )
        captured = name.lower() == "adamw" and device.type == "cuda"
        if name.lower() == "adamw":
            values = {"fused": True, "capturable": captured} | values
        parameters = [
            {"params": tensors, "lr": torch.tensor(group.lr, device=device) if captured else group.lr}
            for group, tensors in zip(groups, self._tensors, strict=True)
        ]
        if self.sets_own_lr:
            values |= {"lr": None}
            for entries in parameters:
                entries.pop("lr")
        self.optimizer: torch.optim.Optimizer = cls(parameters, **values)
        self.train_mode(True)

    def _room(self, group: Group) -> int:
        """Elements of a group's gradients."""
        return room(group.parameters)

    def _hold(self, group: Group, gradient: Tensor, *, elementwise: bool) -> list[Parameter]:
        """Put a group's gradients into their buffer. Gives what the optimizer moves."""
        if elementwise:
            return [flatten(group.parameters, gradient)]
        collect(group.parameters, gradient)
        return list(group.parameters)

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients, in the fewest tensors there are."""
        return [t.grad for tensors in self._tensors for t in tensors if t.grad is not None]

    def begin(self, factors: Sequence[float]) -> None:
        """Begin a step, whose learning rates have these factors: gradients are zero."""
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set gradients to zero where they are."""
        self._whole.zero_()

    def reduce(self, world: World, loss: Tensor) -> None:
        """Replace gradients and the loss by their sums over all processes: one transfer.

        Each process has divided by the samples of all, so sums are means, however many samples
        each had. Everything stays where it is and nothing waits for the device.
        """
        if world.size == 1:
            return
        self._whole[-1:].copy_(loss)
        world.add_up(self._whole)
        loss.copy_(self._whole[-1])

    def norm(self) -> Tensor:
        """The 2-norm of all gradients, on the device."""
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.gradients])
        whole: Tensor = torch.linalg.vector_norm(norms)
        return whole

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale gradients to a norm of at most ``limit`` (0: no limit); none at all if it is not finite.

        ``g·min(1, limit/(norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_``. A step with a NaN
        must not spoil the parameters before the loop has looked at the loss.
        """
        finite = norm.isfinite()
        factor = finite.to(norm.dtype)
        if limit > 0:
            factor = torch.where(finite, (limit / (norm + 1e-6)).clamp_max(1.0), 0.0)
        for gradient in self.gradients:
            torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0).mul_(factor)

    def step(self, factors: Sequence[float]) -> None:
        """One step, every group's learning rate multiplied by its factor."""
        for group, entry, factor in zip(self.groups, self.optimizer.param_groups, factors, strict=True):
            if self.sets_own_lr:
                continue
            if isinstance(entry["lr"], torch.Tensor):
                entry["lr"].fill_(group.lr * factor)
            else:
                entry["lr"] = group.lr * factor
        self.optimizer.step()

    def train_mode(self, training: bool) -> None:
        """For schedule-free optimizers, whose parameters differ while training."""
        change = getattr(self.optimizer, "train" if training else "eval", None)
        if callable(change):
            change()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON can hold it."""
        return saved(self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave.

        Raises
        ------
        BadInputError
            If it is not of these groups.
        """
        restore(self.optimizer, tensors, rest)
