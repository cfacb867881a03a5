"""An optimizer sharded over processes: each keeps the state of a part of the parameters, and moves it.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
first stage. Summed gradients are scattered instead of spread, and moved parameters are gathered, which
together moves as many bytes as summing alone; an optimizer's state takes an N-th of its memory and
its step an N-th of its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lycotool.distributed import World
from lycotool.lazy import torch
from lycotool.training.optimizers import known as registry
from lycotool.training.optimizers.flat import flatten, room
from lycotool.training.optimizers.saved import restore
from lycotool.training.optimizers.stepper import Group, Stepper

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

#: Parts begin at multiples of so many elements.
_ALIGNMENT = 16

#: Elements of a part that are sent at once: 64 MiB of float32.
_MESSAGE = 2**24


def can_shard(name: str) -> bool:
    """Whether an optimizer moves every element by its own gradients alone."""
    return registry.find(name).separable


class ShardedStepper(Stepper):
    """A stepper for one of several processes.

    Every process has all parameters and a buffer for all gradients, which a recorded step needs
    where they are. Of each group's one long vector a process moves its own part.

    Parameters
    ----------
    groups, name, arguments
        As :class:`Stepper`'s; ``name`` is one that :func:`can_shard`.
    world
        All processes, each of which makes one for the same groups.
    """

    def __init__(self, groups: Sequence[Group], name: str, arguments: Sequence[str], world: World) -> None:
        self._world = world
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        super().__init__(groups, name, arguments)

    def _room(self, group: Group) -> int:
        step = self._world.size * _ALIGNMENT
        return -(-room(group.parameters) // step) * step

    def _hold(self, group: Group, gradient: Tensor, *, elementwise: bool) -> list[Parameter]:
        whole = flatten(group.parameters, gradient)
        own = torch.nn.Parameter(self._own(whole.data))
        own.grad = self._own(gradient)
        self._parts.append((whole.data, own.data, gradient, own.grad))
        return [own]

    def _own(self, whole: Tensor) -> Tensor:
        return whole.chunk(self._world.size)[self._world.rank]

    def reduce(self, world: World, loss: Tensor) -> None:
        """Sum gradients over all processes, each for its own part, and the loss for all."""
        for _, _, gradient, own in self._parts:
            world.add_up_parts(gradient, own)
        world.add_up(loss)

    def norm(self) -> Tensor:
        """The 2-norm of all gradients, on the device, the same bits in all processes."""
        square = super().norm().square()
        self._world.add_up(square)
        return square.sqrt()

    def step(self, factors: Sequence[float]) -> None:
        """Move the own part, and take the others' as they moved them."""
        super().step(factors)
        for whole, own, _, _ in self._parts:
            self._world.join_parts(whole, own)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As one process has it, in rank 0; all processes ask for it together."""
        tensors, rest = super().state()
        for name, part in tensors.items():
            if part.ndim:
                tensors[name] = self._collected(part)[: room(self._group_of(name).parameters)]
        return tensors, rest

    def _collected(self, part: Tensor) -> Tensor:
        """Everyone's part in a row, in rank 0; a piece after another, so that messages stay small."""
        pieces = [self._world.collect(piece.to("cpu", copy=True)) for piece in torch.split(part, _MESSAGE)]
        rows = [row for row in pieces if row is not None]
        return torch.cat([row[rank] for rank in range(self._world.size) for row in rows]) if rows else part

    def load_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Take up this process's part of what :meth:`state` gave in any number of processes.

        Raises
        ------
        BadInputError
            If it is not of these groups.
        """
        restore(self.optimizer, {name: self._part_of(name, tensor) for name, tensor in tensors.items()}, rest)

    def _part_of(self, name: str, tensor: Tensor) -> Tensor:
        group = self._group_of(name)
        if tensor.shape != (room(group.parameters),):
            return tensor
        return self._own(torch.nn.functional.pad(tensor, (0, self._room(group) - tensor.numel()))).clone()

    def _group_of(self, name: str) -> Group:
        """Whose a tensor named ``index.key`` is."""
        return self.groups[int(name.partition(".")[0])]
