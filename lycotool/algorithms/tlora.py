"""T-LoRA: ``ΔW = c · (P diag(λ) Q - P₀ diag(λ₀) Q₀)``, linear layers.

``P₀, λ₀, Q₀`` are where training started and are not stored: with the trainer's default
(principal components of the base) ``P₀ diag(λ₀) Q₀`` is the best rank-``r`` approximation
of the weight it was trained on, so the change is right with that base only.
[T-LoRA, arXiv 2507.05964; LyCORIS 4 ``modules/tlora.py``]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.algorithms.base import (
    ALPHA,
    Advice,
    Algorithm,
    Bound,
    Layout,
    Rule,
    Shape,
    Slot,
    rank_dims,
    size_of,
)
from lycotool.algorithms.rows import is_permutation, rows_of, take_along
from lycotool.algorithms.training import Untrainable
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TRIPLE = Layout(
    name="triple",
    slots=(
        Slot("p_layer.weight", "out rank *1"),
        Slot("lambda_layer", "1 rank"),
        Slot("q_layer.weight", "rank in *1"),
        ALPHA,
    ),
    rows=size_of("out"),
    columns=size_of("in"),
)


def delta(module: Bound, shape: Shape, base: Tensor | None) -> Tensor:
    """``c · (P diag(λ) Q - best rank-r approximation of W)``."""
    if base is None:
        raise ValueError("tlora needs the base weight")
    p, q = module["p_layer.weight"].flatten(1), module["q_layer.weight"].flatten(1)
    rank = p.shape[1]
    u, s, vh = torch.linalg.svd(base.flatten(1).double(), full_matrices=False)
    start = (u[:, :rank] * s[:rank]) @ vh[:rank]
    trained = (p * module["lambda_layer"]) @ q
    change: Tensor = module.dims.scale * (trained - start.to(trained.dtype))
    return change.reshape(shape)


def take_rows(module: Bound, index: Tensor) -> dict[str, Tensor] | None:
    """All rows in another order, which the best approximation of ``W`` follows.

    That of some rows of ``W`` is not some rows of the best approximation.
    """
    return take_along(module, {"out": index}) if is_permutation(index, rows_of(module)) else None


TLORA = Algorithm(
    name="tlora",
    title="T-LoRA (difference of two orthogonal low-rank forms)",
    citation="T-LoRA, arXiv 2507.05964",
    layouts=(TRIPLE,),
    dims=rank_dims("rank"),
    delta=delta,
    needs_base=True,
    take_rows=take_rows,
    merge=Rule(
        False,
        "T-LoRA is not mergeable: its change is relative to the weight it was trained on",
        "`--rebuild --base CHECKPOINT` merges the rebuilt weight change; "
        "`lycotool bake` folds it into a checkpoint",
    ),
    resize=Rule(False, "its change depends on the base weight"),
    training=Untrainable(
        "its file does not hold where training started, so no reader can know its change for certain"
    ),
    advice=(Advice("right only with the checkpoint it was trained on"),),
)
