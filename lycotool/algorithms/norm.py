"""norm: ``Δw = w_norm``, ``Δb = b_norm`` of a normalisation layer. No alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    Algorithm,
    Bound,
    Layout,
    Rule,
    Shape,
    Slot,
    StackPart,
    no_rank,
    size_of,
)
from lycotool.algorithms.full import add_slots
from lycotool.algorithms.rows import stack_slots, take_axis
from lycotool.algorithms.training import Arguments, Start, Training, zeros

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.lazy import torch

VECTORS = Layout(
    name="vectors",
    slots=(Slot("w_norm", "channels"), Slot("b_norm", "channels", required=False)),
    rows=size_of("channels"),
    columns=size_of(),
    linear_in=("w_norm", "b_norm"),
)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``w_norm``."""
    return module["w_norm"].reshape(shape)


def bias_delta(module: Bound) -> Tensor | None:
    """``b_norm``."""
    return module.get("b_norm")


def stack_rows(parts: Sequence[StackPart]) -> tuple[dict[str, Tensor], float]:
    """``[w_norm; w_norm'; …]``; a missing tensor is zero."""
    return stack_slots(parts, "w_norm", "b_norm"), 1.0


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """Zeros."""
    trained = {"w_norm": zeros(layer.out)}
    return Start(VECTORS, {**trained, "b_norm": zeros(layer.out)} if layer.bias else trained)


NORM = Algorithm(
    name="norm",
    title="norm (difference of a normalisation layer)",
    citation="LyCORIS, arXiv 2309.14859",
    layouts=(VECTORS,),
    dims=no_rank,
    delta=delta,
    bias_delta=bias_delta,
    concat=add_slots,
    take_rows=take_axis("channels"),
    stack_rows=stack_rows,
    merge=Rule(True, "differences add"),
    resize=Rule(False, "a vector has no rank"),
    training=Training(
        arguments=frozenset(),
        kinds=frozenset({"norm"}),
        init=init,
        layouts=(VECTORS,),
        optional=frozenset({"b_norm"}),
        learning_rate=2e-4,
        shrinking="linear",
    ),
)
