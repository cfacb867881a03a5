"""Two halves of an optimizer are the whole one; what they tell each other is in test_several_processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lycotool.distributed import World
from lycotool.training.optimizers.known import KNOWN
from lycotool.training.optimizers.sharded_stepper import ShardedStepper, can_shard
from lycotool.training.optimizers.stepper import Group, Stepper

#: Rooms of 48 and 16 elements: halves of 32 and, padded to it, 16.
SHAPES = (((5, 3), (7,), (2, 3, 1, 1)), ((11,),))


class Alone(World):
    """One of two processes that see the same images, without the other one.

    Gradients are sums already. What the other sent is what this one has.
    """

    def add_up_parts(self, whole: torch.Tensor, own: torch.Tensor) -> None: ...

    def join_parts(self, whole: torch.Tensor, own: torch.Tensor) -> None: ...

    def add_up(self, tensor: torch.Tensor) -> None: ...

    def collect(self, value: Any) -> list[Any]:
        return [value] * self.size


def groups() -> list[Group]:
    made = torch.Generator().manual_seed(0)
    return [
        Group(name, lr, tuple(torch.nn.Parameter(torch.randn(shape, generator=made)) for shape in shapes))
        for name, lr, shapes in zip(("unet", "te1"), (1e-2, 3e-3), SHAPES, strict=True)
    ]


def descend(steppers: Sequence[Stepper], first: int, last: int) -> None:
    """The same gradients for all, as a sum over processes is; then everyone's parts to everyone."""
    for step in range(first, last):
        for stepper in steppers:
            stepper.begin([1.0, 1.0])
            made = torch.Generator().manual_seed(step)
            for group in stepper.groups:
                for parameter in group.parameters:
                    assert parameter.grad is not None
                    parameter.grad.copy_(torch.randn(parameter.shape, generator=made))
            stepper.step([1.0, 1.0])
        halves = [stepper for stepper in steppers if isinstance(stepper, ShardedStepper)]
        for one, other in zip(halves[0]._parts, halves[1]._parts, strict=True):
            both = torch.cat([one[1], other[1]])
            one[0].copy_(both)
            other[0].copy_(both)


def values(stepper: Stepper) -> list[torch.Tensor]:
    return [parameter.detach() for group in stepper.groups for parameter in group.parameters]


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Kernels may round the last of a vector otherwise than its middle: a few roundings of float32."""
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in KNOWN if can_shard(name)])
def test_halves_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parameters, in the state they write, and when they go on from one process's state."""
    monkeypatch.setattr("lycotool.training.optimizers.sharded_stepper._MESSAGE", 10)
    arguments = ("weight_decay=0.1",)
    whole = Stepper(groups(), name, arguments)
    halves = [
        ShardedStepper(groups(), name, arguments, Alone(rank, 2, torch.device("cpu"))) for rank in (0, 1)
    ]
    descend([whole, *halves], 0, 3)
    for half in halves:
        assert all(map(near, values(half), values(whole)))
    tensors, rest = whole.state()
    parts = [half.state()[0] for half in halves]
    for key, expected in tensors.items():
        if expected.ndim == 0:
            assert all(torch.equal(part[key], expected) for part in parts)
            continue
        firsts, seconds = (half.optimizer.state_dict()["state"][int(key[0])][key[2:]] for half in halves)
        assert near(torch.cat([firsts, seconds])[: expected.numel()], expected)
        for part, own in zip(parts, (firsts, seconds), strict=True):  # as if both were alike
            assert torch.equal(part[key], torch.cat([own, own])[: expected.numel()])

    fresh = [
        ShardedStepper(groups(), name, arguments, Alone(rank, 2, torch.device("cpu"))) for rank in (0, 1)
    ]
    for half in fresh:
        half.load_state({key: tensor.clone() for key, tensor in tensors.items()}, rest)  # as from a file
        with torch.no_grad():
            for mine, theirs in zip(values(half), values(whole), strict=True):
                mine.copy_(theirs)
    descend([whole, *fresh], 3, 5)
    for half in fresh:
        assert all(map(near, values(half), values(whole)))


def test_others_need_all_parameters_together() -> None:
    assert [name for name in KNOWN if can_shard(name)] == ["adamw", "lion", "sgd", "sgdnesterov"]
