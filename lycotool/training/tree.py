"""Tensors inside data classes, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_of(getattr(value, entry.name))


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same with every tensor replaced; what is no tensor stays."""
    made: Any = value
    if isinstance(value, torch.Tensor):
        made = change(value)
    elif isinstance(value, list | tuple):
        made = type(value)(with_tensors(part, change) for part in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {entry.name: with_tensors(getattr(value, entry.name), change) for entry in fields(value)}
        made = type(value)(**parts)
    return made  # type: ignore[no-any-return]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moved without waiting: a GPU reads from page-locked memory while the CPU goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
