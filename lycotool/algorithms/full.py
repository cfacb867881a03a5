"""full: ``ΔW = diff``, ``Δb = diff_b``. What native fine-tuning saves. No alpha.

A module may change the bias alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    Advice,
    Algorithm,
    Bound,
    Layout,
    Rule,
    Shape,
    Slot,
    StackPart,
    no_rank,
    size_of,
    stored_bias,
    unknown,
)
from lycotool.algorithms.rows import agree, modules_of, stack_slots, take_axis
from lycotool.algorithms.training import Arguments, Start, Training, zeros
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer

DIFF = Layout(
    name="diff",
    slots=(Slot("diff", "out *rest"), Slot("diff_b", "out", required=False)),
    rows=size_of("out"),
    columns=size_of("rest"),
    linear_in=("diff", "diff_b"),
)

BIAS_ONLY = Layout(
    name="bias only",
    slots=(Slot("diff_b", "out"),),
    rows=size_of("out"),
    columns=unknown,
    linear_in=("diff_b",),
)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``diff``; zero where only the bias changes."""
    if "diff" in module:
        return module["diff"].reshape(shape)
    return torch.zeros(shape, dtype=module["diff_b"].dtype, device=module["diff_b"].device)


def add_slots(parts: list[tuple[Bound, float]]) -> dict[str, Tensor]:
    """Slot by slot ``Σ weight · tensor``; a missing tensor is zero."""
    total: dict[str, Tensor] = {}
    for module, weight in parts:
        for slot, tensor in module.tensors.items():
            scaled = tensor * weight
            total[slot] = total[slot] + scaled if slot in total else scaled
    return total


def stack_rows(parts: Sequence[StackPart]) -> tuple[dict[str, Tensor], float] | None:
    """``[diff; diff'; …]``; a missing tensor is zero."""
    if not agree([module["diff"] for module in modules_of(parts) if "diff" in module]):
        return None
    return stack_slots(parts, "diff", "diff_b"), 1.0


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """Zeros."""
    trained = {"diff": zeros(*layer.shape)}
    return Start(DIFF, {**trained, "diff_b": zeros(layer.out)} if layer.bias else trained)


FULL = Algorithm(
    name="full",
    title="full (native fine-tuning difference)",
    citation="LyCORIS, arXiv 2309.14859",
    layouts=(DIFF, BIAS_ONLY),
    dims=no_rank,
    delta=delta,
    bias_delta=stored_bias,
    concat=add_slots,
    take_rows=take_axis("out"),
    stack_rows=stack_rows,
    merge=Rule(True, "differences add"),
    resize=Rule(
        False, "a full difference has no rank", "`lycotool bake` it and `lycotool extract` at a rank"
    ),
    training=Training(
        arguments=frozenset(),
        init=init,
        layouts=(DIFF,),
        optional=frozenset({"diff_b"}),
        learning_rate=2e-6,
        shrinking="linear",
    ),
    advice=(
        Advice(
            "a learning rate near 5e-6 is recommended",
            frozenset({"learning_rate"}),
            lambda v: 1e-6 <= v["learning_rate"] <= 2e-5,
        ),
    ),
)
