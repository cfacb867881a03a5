"""Interpolate between two changes along the arc between their directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.linalg.merging.base import Along

#: Cosines beyond this are interpolated on the line (mergekit's and its ancestors' bound).
NEARLY_COLLINEAR = 0.9995


def slerp(first: Tensor, second: Tensor, t: float, *, along: Along = "whole", collinear: float) -> Tensor:
    """``sin((1-t)θ)/sin θ · a + sin(tθ)/sin θ · b`` with ``θ`` the angle between ``a`` and ``b``.

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), for vectors that
    keep their lengths. A zero vector has no direction, and (nearly) collinear ones no unique
    arc: those are interpolated on the line, ``(1-t)·a + t·b``.

    Parameters
    ----------
    along
        The vectors: the whole tensor, its rows (one per output of the layer), or the columns
        of the weight flattened to two axes.
    collinear
        The cosine beyond which vectors are interpolated on the line.
    """
    shape = first.shape
    one, two = (_vectors(tensor, along) for tensor in (first, second))
    inner = torch.sum(one * two, dim=-1, keepdim=True, dtype=torch.float64)
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64) for x in (one, two)]
    product = lengths[0] * lengths[1]
    cosine = torch.where(product > 0, inner / torch.where(product > 0, product, 1), 1).clamp(-1, 1)
    theta = torch.acos(cosine)
    is_line = cosine.abs() > collinear
    sine = torch.where(is_line, 1, torch.sin(theta))
    weights = (
        torch.where(is_line, line, torch.sin(part * theta) / sine).to(first.dtype)
        for part, line in ((1 - t, 1 - t), (t, t))
    )
    mixed = next(weights) * one + next(weights) * two
    return (mixed.T if along == "columns" and first.ndim > 1 else mixed).reshape(shape)


def _vectors(tensor: Tensor, along: Along) -> Tensor:
    """The vectors as rows."""
    if along == "whole" or tensor.ndim < 2:
        return tensor.reshape(1, -1)
    matrix = tensor.reshape(len(tensor), -1)
    return matrix if along == "rows" else matrix.T
