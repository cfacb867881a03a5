"""The DoRA nearest to a fine-tuned weight: a low-rank change of direction, and magnitudes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch
from lycotool.linalg.dense import best_approximation
from lycotool.linalg.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 40
_CONVERGED = 1e-3


def nearest_direction(
    base: Tensor, tuned: Tensor, axis: int, rank: int, *, seed: int
) -> tuple[LowRank, Tensor]:
    """``X`` of a rank and ``m`` such that ``m (W + X) / ‖W + X‖`` is near ``tuned``.

    DoRA fixes only the direction of ``W + X``, so the target may be scaled freely along the
    axis: ``min ‖D·W' - W - X‖`` over the diagonal ``D`` and ``X`` of rank ``r``. Both steps
    have closed forms and never increase it: ``X`` is the truncated SVD of ``D·W' - W``, and
    ``Dᵢ = ⟨W'ᵢ, (W + X)ᵢ⟩ / ‖W'ᵢ‖²``. A weight that DoRA trained has residual 0.

    Parameters
    ----------
    base, tuned
        ``W`` and ``W'``, of one shape.
    axis
        0 keeps output rows' norms, 1 input columns'.

    Returns
    -------
    LowRank
        ``X``.
    Tensor
        ``m``, the norms of ``tuned``, of shape ``(out, 1…)`` or ``(1, in, 1…)``.
    """
    others = [dim for dim in range(base.ndim) if dim != axis]
    magnitude = torch.linalg.vector_norm(tuned, dim=others, keepdim=True)
    power = magnitude.square().clamp_min(torch.finfo(tuned.dtype).tiny)
    scale = torch.linalg.vector_norm(base, dim=others, keepdim=True) / power.sqrt()
    previous = float("inf")
    low = LowRank(base.new_zeros(base.shape[0], rank), base.new_zeros(rank, base[0].numel()))
    for _ in range(_ROUNDS):
        target = scale * tuned - base
        low = best_approximation(target.flatten(1), rank, seed=seed)
        v = base + low.dense().reshape(base.shape)
        residual = float(torch.linalg.vector_norm(scale * tuned - v))
        if residual >= previous * (1 - _CONVERGED):
            break
        previous = residual
        scale = (tuned * v).sum(others, keepdim=True) / power
    return low, magnitude
