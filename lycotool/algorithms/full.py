"""full: ``ΔW = diff``, ``Δb = diff_b``. What native fine-tuning saves. No alpha.

A module may change the bias alone.
"""

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
    stored_bias,
    unknown,
)
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

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


FULL = Algorithm(
    name="full",
    title="full (native fine-tuning difference)",
    citation="LyCORIS, arXiv 2309.14859",
    layouts=(DIFF, BIAS_ONLY),
    dims=no_rank,
    delta=delta,
    bias_delta=stored_bias,
    concat=add_slots,
    merge=Rule(True, "differences add"),
    resize=Rule(
        False, "a full difference has no rank", "`lycotool bake` it and `lycotool extract` at a rank"
    ),
    advice="a learning rate near 5e-6 is recommended",
)
