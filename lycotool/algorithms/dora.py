"""DoRA, a modifier of LoRA, LoHa and LoKr: ``W' = m · V / ‖V‖``, ``V = W + ΔW₀``.

The norm runs over every axis but one: per output row (``dora_scale`` of shape ``(out, 1…)``,
PEFT's ``lora_magnitude_vector``) or per input column (``(1, in, 1…)``, LyCORIS before 3.2).

Away from strength 1 the programs differ. lycotool's change is ``s·(W'(1) - W)``; the others
by name: ``lycoris`` is ``V·(s·(m/‖V‖ - 1) + 1) - W``, where the strength does not reach
``ΔW₀``; ``peft`` is ``m·V_s/‖V_s‖ - W`` with ``V_s = W + s·ΔW₀``. [DoRA, arXiv 2402.09353]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from lycotool.algorithms.base import MismatchError, Rule, Shape, Slot
from lycotool.algorithms.rows import is_permutation, stack
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.layer import TrainableLayer
    from lycotool.linalg.low_rank import LowRank

Axis = Literal["out", "in"]
Convention = Literal["linear", "lycoris", "peft"]

#: The magnitude, by LyCORIS' name and by PEFT's, whose axis is always the output.
DORA_SCALE = Slot("dora_scale", "*magnitude", required=False)
MAGNITUDE_VECTOR = Slot("lora_magnitude_vector", "*magnitude", required=False)
SLOTS = (DORA_SCALE, MAGNITUDE_VECTOR)

MERGE_RULE = Rule(
    False,
    "DoRA is not mergeable: it renormalises the base weight",
    "`--rebuild --base CHECKPOINT` merges the rebuilt weight change; "
    "`lycotool bake` folds it into a checkpoint",
)
RESIZE_RULE = Rule(False, "the magnitudes belong to the full-rank direction")


def axis_of(slot: str, shape: Shape) -> Axis:
    """Which axis keeps its own norms, from the key and the shape of the magnitude.

    Raises
    ------
    MismatchError
        If the shape is not a vector along the first or second axis.
    """
    sizes = [size for size in shape if size != 1]
    if len(sizes) > 1 or not shape:
        raise MismatchError(f"{slot} has shape {list(shape)}, expected (out, 1…) or (1, in, 1…)")
    if slot == DORA_SCALE.name and len(shape) > 1 and shape[0] == 1:
        return "in"
    return "out"


def take_rows(slot: str, magnitude: Tensor, axis: Axis, index: Tensor, rows: int) -> Tensor | None:
    """The magnitude of these of a layer's rows.

    None for some of the rows under norms per input column, which run over all of them; and
    for one row whose magnitude would read as one column's.
    """
    if axis == "in":
        return magnitude if is_permutation(index, rows) else None
    taken = magnitude.index_select(_vector_axis(magnitude), index.to(magnitude.device))
    return taken if axis_of(slot, tuple(taken.shape)) == axis else None


def stack_rows(magnitudes: Sequence[Tensor]) -> Tensor:
    """The magnitude of layers below each other, each with one norm per output row."""
    shape = [1] * magnitudes[0].ndim
    shape[_vector_axis(magnitudes[0])] = -1
    return stack([magnitude.flatten() for magnitude in magnitudes]).reshape(shape)


def _vector_axis(magnitude: Tensor) -> int:
    return magnitude.shape.index(max(magnitude.shape))


def delta(
    magnitude: Tensor,
    axis: Axis,
    inner: Tensor,
    base: Tensor,
    *,
    strength: float,
    convention: Convention,
) -> Tensor:
    """The change of the weight at ``strength``, strength included.

    Parameters
    ----------
    magnitude
        ``m``, any shape of ``out`` or ``in`` elements.
    inner
        ``ΔW₀`` of the algorithm underneath, at strength 1.
    """
    kept = 0 if axis == "out" else 1
    if base.ndim <= kept or magnitude.numel() != base.shape[kept]:
        raise MismatchError(
            f"dora_scale has {magnitude.numel()} elements for the {axis} axis of shape {list(base.shape)}"
        )
    broadcast = [1] * base.ndim
    broadcast[kept] = -1
    magnitude = magnitude.reshape(broadcast)
    others = [dim for dim in range(base.ndim) if dim != kept]

    def direction(v: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=True)
        # In this order an untrained magnitude, which is the norm, gives V exactly.
        return magnitude / norm.clamp_min(torch.finfo(v.dtype).tiny) * v

    if convention == "peft":
        return direction(base + strength * inner) - base
    v = base + inner
    if convention == "lycoris":
        return strength * (direction(v) - v) + inner
    return strength * (direction(v) - base)


# --- training ------------------------------------------------------------------------------


def squared_norms(weight: Tensor, axis: Axis) -> Tensor:
    """``‖W‖²`` of each output row or input column, a vector."""
    kept = 0 if axis == "out" else 1
    return weight.square().sum([dim for dim in range(weight.ndim) if dim != kept])


def initial(squares: Tensor, axis: Axis, shape: Shape) -> Tensor:
    """The magnitude that changes nothing: the norms of W, ``(out, 1…)`` or ``(1, in, 1…)``."""
    size = [1] * len(shape)
    size[0 if axis == "out" else 1] = -1
    return squares.sqrt().reshape(size)


def product_with_base(weight: Tensor, low: LowRank, axis: Axis) -> Tensor:
    """``W @ downᵀ`` or ``upᵀ @ W``, in the factors' dtype: all of W that the norms of a sum need.

    The product is done in W's dtype.
    """
    flat = weight.flatten(1)
    if axis == "out":
        return (flat @ low.folded().down.T.to(flat.dtype)).to(low.up.dtype)
    return (low.up.T.to(flat.dtype) @ flat).to(low.up.dtype)


def squared_norms_of_sum(squares: Tensor, low: LowRank, product: Tensor, axis: Axis) -> Tensor:
    """``‖W + up @ down‖²`` along ``axis``, without the sum.

    ``‖W‖² + 2 Σ W ∘ (up @ down) + ‖up @ down‖²``; the two inner products reduce to products
    with one factor.

    Parameters
    ----------
    squares
        :func:`squared_norms` of W.
    product
        :func:`product_with_base`.
    """
    up, down = low.up, low.folded().down  # (o, r), (r, i·k)
    if axis == "out":
        own = (up @ (down @ down.T) * up).sum(1)
        return squares + 2 * (product * up).sum(1) + own
    own = ((up.T @ up) @ down * down).sum(0)
    change = 2 * (product * down).sum(0) + own
    return squares + torch.unflatten(change, 0, (squares.shape[0], -1)).sum(1)


def gain(magnitude: Tensor, squares: Tensor, low: LowRank, product: Tensor, axis: Axis) -> Tensor:
    """``m / ‖W + up @ down‖ - 1``, a vector; parameters as in :func:`squared_norms_of_sum`.

    Less 1, because that keeps the digits that half precision has no room for.
    """
    norms = squared_norms_of_sum(squares, low, product, axis)
    return magnitude.flatten() / norms.clamp_min(torch.finfo(norms.dtype).tiny).sqrt() - 1


def output(
    gain: Tensor, axis: Axis, layer: TrainableLayer, x: Tensor, direction: Callable[[Tensor], Tensor]
) -> Tensor:
    """``op(x, m · V / ‖V‖)`` from ``direction(x) = op(x, V)`` and :func:`gain`."""
    if axis == "in":
        return direction(x + layer.channels(gain, x) * x)
    y = direction(x)
    return y + layer.channels(gain, y) * y
