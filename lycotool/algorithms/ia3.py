"""(IA)³: ``W' = diag(1 + w) W``, or ``W diag(1 + w)`` when ``on_input`` is 1.

``ΔW = w ∘ W`` along the output or the input axis. [(IA)³, arXiv 2205.05638]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    Advice,
    Algorithm,
    Bound,
    Layout,
    MismatchError,
    Rule,
    Shape,
    Slot,
    StackPart,
    no_rank,
    stored_bias,
    unknown,
)
from lycotool.algorithms.full import add_slots
from lycotool.algorithms.rows import are_equal, modules_of, stack, stack_slots
from lycotool.algorithms.training import Arguments, BaseFn, Operands, Start, Structured, Training, zeros
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer

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
    axis = 1 if module.switch("on_input") else 0
    vector = module["weight"].flatten()
    if len(shape) <= axis or vector.numel() != shape[axis]:
        side = "input" if axis else "output"
        raise MismatchError(
            f"weight has {vector.numel()} elements, the layer's {side} axis (shape {list(shape)}) has another size"
        )
    broadcast = [1] * len(shape)
    broadcast[axis] = -1
    return vector.reshape(broadcast).to(base.dtype) * base


def init(layer: TrainableLayer, arguments: Arguments, generator: torch.Generator) -> Start:
    """Zeros, in the shape LyCORIS stores: ``(n,)``, for convolutions ``(1, n, 1…)``."""
    length = layer.shape[1 if arguments.train_on_input else 0]
    shape = (1, length, *[1] * len(layer.kernel)) if layer.kernel else (length,)
    return Start(VECTOR, {"weight": zeros(*shape)}, {"on_input": torch.tensor(int(arguments.train_on_input))})


def operands(module: Bound) -> Operands:
    """The vector, by the side that it multiplies."""
    return {"input" if module.switch("on_input") else "output": module["weight"].flatten()}


def output(operands: Operands, layer: TrainableLayer, x: Tensor, base: BaseFn) -> Tensor:
    """``W (x + w ∘ x)``, or ``W x + w ∘ W x``."""
    if "input" in operands:
        return base(x + layer.channels(operands["input"], x) * x)
    unchanged = base(x)
    return unchanged + layer.channels(operands["output"], unchanged) * unchanged


def concat(parts: list[tuple[Bound, float]]) -> dict[str, Tensor] | None:
    """Vectors on the same axis add: both changes refer to the original weight."""
    modules = [module for module, _ in parts]
    if len({(m.switch("on_input"), tuple(m["weight"].shape)) for m in modules}) != 1:
        return None
    added = add_slots(
        [(replace(m, tensors={k: t for k, t in m.tensors.items() if k != "on_input"}), w) for m, w in parts]
    )
    return {**added, "on_input": modules[0]["on_input"]}


def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor]:
    """Entries of a vector on the output; a vector on the input is the same for every row."""
    taken = {slot.name: module[slot.name] for slot in VECTOR.slots if slot.name in module}
    for slot in ("diff_b",) if module.switch("on_input") else ("weight", "diff_b"):
        if slot in taken:
            vector = taken[slot]
            if index.numel() and int(index.max()) >= vector.numel():
                raise MismatchError(f"{slot} has {vector.numel()} elements, the layer has more rows")
            taken[slot] = _column(vector.flatten()[index.to(vector.device)], vector.ndim)
    return taken


def stack_rows(parts: Sequence[StackPart]) -> tuple[dict[str, Tensor], float] | None:
    """Vectors on the output below each other, 0 where nothing changes; one vector on the input."""
    modules = modules_of(parts)
    weight, on_input = modules[0]["weight"], modules[0]["on_input"]
    if len({module.switch("on_input") for module in modules}) != 1:
        return None
    if modules[0].switch("on_input"):
        # Such a vector does not tell how many rows lack a bias.
        is_told = len(modules) == len(parts) and len({"diff_b" in module for module in modules}) == 1
        if not is_told or not are_equal([module["weight"] for module in modules]):
            return None
        return {"weight": weight, "on_input": on_input, **stack_slots(parts, "diff_b")}, 1.0
    vector = stack([part if isinstance(part, int) else part["weight"].flatten() for part in parts])
    biases = stack_slots(parts, "diff_b", rows=lambda module: module["weight"].numel())
    return {"weight": _column(vector, weight.ndim), "on_input": on_input, **biases}, 1.0


def _column(vector: Tensor, axes: int) -> Tensor:
    """``(n, 1…)``, with so many axes."""
    return vector.reshape(-1, *[1] * (axes - 1))


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
    take_rows=take_rows,
    stack_rows=stack_rows,
    merge=Rule(
        False,
        "(IA)³ is not mergeable: its change is a multiple of the base weight",
        "`--rebuild` adds vectors of the same axis, or uses `--base`; "
        "`lycotool bake` folds it into a checkpoint",
    ),
    resize=Rule(False, "a vector has no rank"),
    training=Training(
        arguments=frozenset({"train_on_input"}),
        init=init,
        layouts=(VECTOR,),
        learning_rate=5e-3,
        structured=Structured(operands=operands, output=output, cost=lambda sizes, layer: layer.out),
        shrinking="linear",
    ),
    advice=(
        Advice(
            "a learning rate of 5e-3 to 1e-2 is recommended",
            frozenset({"learning_rate"}),
            lambda v: 5e-3 <= v["learning_rate"] <= 1e-2,
        ),
    ),
)
