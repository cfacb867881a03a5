"""norm: ``Δw = w_norm``, ``Δb = b_norm`` of a normalisation layer. No alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    Algorithm,
    Bound,
    Layout,
    Rule,
    Shape,
    Slot,
    no_rank,
    size_of,
)
from lycotool.algorithms.full import add_slots

if TYPE_CHECKING:
    from torch import Tensor

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


NORM = Algorithm(
    name="norm",
    title="norm (difference of a normalisation layer)",
    citation="LyCORIS, arXiv 2309.14859",
    layouts=(VECTORS,),
    dims=no_rank,
    delta=delta,
    bias_delta=bias_delta,
    concat=add_slots,
    merge=Rule(True, "differences add"),
    resize=Rule(False, "a vector has no rank"),
)
