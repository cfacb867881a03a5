"""Tensors inside data classes, lists and tuples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lycotool.training.tree import tensors_of, to_device, with_tensors


@dataclass(frozen=True)
class Inner:
    tensor: Tensor
    text: str
    missing: Tensor | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    several: list[Tensor]
    pair: tuple[Tensor, int]


def test_every_tensor_in_order_and_back() -> None:
    parts = [torch.tensor(number) for number in range(4)]
    whole = Outer(Inner(parts[0], "text"), parts[1:3], (parts[3], 7))
    assert [int(tensor) for tensor in tensors_of(whole)] == [0, 1, 2, 3]
    moved = with_tensors(whole, lambda tensor: tensor + 10)
    assert [int(tensor) for tensor in tensors_of(moved)] == [10, 11, 12, 13]
    assert (moved.inner.text, moved.inner.missing, moved.pair[1]) == ("text", None, 7)
    assert [int(tensor) for tensor in tensors_of(whole)] == [0, 1, 2, 3]


def test_to_a_device_it_is_on() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
