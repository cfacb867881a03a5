"""Bytes of what an optimizer keeps, seen by letting it take a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lycotool.lazy import torch
from lycotool.training.optimizers import known as registry
from lycotool.training.optimizers.flat import padded

#: A parameter for optimizers that need real numbers: large enough that 8-bit ones use 8 bits.
_PROBE = (256, 256)


def state_bytes(
    name: str, arguments: Sequence[str], shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of an optimizer's state for parameters of these shapes.

    The class takes a step on parameters of the meta device, which are of any size; one that cannot
    takes it on a small parameter, and its bytes for each element are taken for all.
    """
    entry, cls, values = registry.chosen(name, arguments)
    values["lr"] = None if values.get("relative_step") else 1e-3
    counts = Counter(shapes)
    if entry.elementwise:
        counts = Counter({(sum(padded(_elements(shape)) * count for shape, count in counts.items()),): 1})
    total = 0
    for shape, count in counts.items():
        try:
            size = _after_a_step(cls, values, shape, dtype, "meta")
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            ratio = _after_a_step(cls, values, _PROBE, dtype, "cpu") / _elements(_PROBE)
            size = int(ratio * _elements(shape))
        total += size * count
    return total


def _after_a_step(
    cls: type, values: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> int:
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = cls([parameter], **values)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    optimizer.step()
    state = optimizer.state[parameter]
    return sum(
        value.untyped_storage().nbytes()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")  # one for all parameters
    )


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
