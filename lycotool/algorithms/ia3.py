"""(IA)³: ``W' = diag(1 + w) W``, or ``W diag(1 + w)`` when ``on_input`` is 1.

``ΔW = w ∘ W`` along the output or the input axis. [(IA)³, arXiv 2205.05638]
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    Algorithm,
    Bound,
    Layout,
    MismatchError,
    Rule,
    Shape,
    Slot,
    no_rank,
    stored_bias,
    unknown,
)
from lycotool.algorithms.full import add_slots

if TYPE_CHECKING:
    from torch import Tensor

VECTOR = Layout(
    name="vector",
    slots=(Slot("weight", "*vector"), Slot("on_input", "scalar"), Slot("diff_b", "bias", required=False)),
    rows=unknown,
    columns=unknown,
    linear_in=("weight", "diff_b"),
)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``w ∘ W``, along axis 0 or, with ``on_input``, axis 1."""
    if base is None:
        raise ValueError("ia3 needs the base weight")
    axis = 1 if module["on_input"].item() else 0
    vector = module["weight"].flatten()
    if len(shape) <= axis or vector.numel() != shape[axis]:
        side = "input" if axis else "output"
        raise MismatchError(
            f"weight has {vector.numel()} elements, the layer's {side} axis (shape {list(shape)}) has another size"
        )
    broadcast = [1] * len(shape)
    broadcast[axis] = -1
    return vector.reshape(broadcast) * base


def concat(parts: list[tuple[Bound, float]]) -> dict[str, Tensor] | None:
    """Vectors on the same axis add: both changes refer to the original weight."""
    modules = [module for module, _ in parts]
    if len({(int(m["on_input"].item()), tuple(m["weight"].shape)) for m in modules}) != 1:
        return None
    added = add_slots(
        [(replace(m, tensors={k: t for k, t in m.tensors.items() if k != "on_input"}), w) for m, w in parts]
    )
    return {**added, "on_input": modules[0]["on_input"]}


IA3 = Algorithm(
    name="ia3",
    title="(IA)³ (learned scaling of rows or columns)",
    citation="(IA)³, arXiv 2205.05638",
    layouts=(VECTOR,),
    dims=no_rank,
    delta=delta,
    bias_delta=stored_bias,
    needs_base=True,
    concat=concat,
    merge=Rule(
        False,
        "(IA)³ is not mergeable: its change is a multiple of the base weight",
        "`--rebuild` adds vectors of the same axis, or uses `--base`; "
        "`lycotool bake` folds it into a checkpoint",
    ),
    resize=Rule(False, "a vector has no rank"),
    advice="a learning rate of 5e-3 to 1e-2 is recommended",
)
