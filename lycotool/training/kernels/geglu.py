"""``a · gelu(b)`` of the two halves of a projection, in one kernel each way.

Left to PyTorch it is two kernels forward and four backward, on halves that are not contiguous.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward(x, y, count, half, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    place = index // half * (2 * half) + index % half
    a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * b * (1.0 + tl.erf(b * 0.7071067811865476))
    tl.store(y + index, (a * gelu).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x, dy, dx, count, half, BLOCK: tl.constexpr):
    """``da = g·gelu(b)``, ``db = g·a·(Φ(b) + b·φ(b))``."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    place = index // half * (2 * half) + index % half
    a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + index, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(b * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * b * b)
    tl.store(dx + place, (gradient * b * below).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + place + half, (gradient * a * (below + b * density)).to(dx.dtype.element_ty), mask=inside)


def geglu(x: Tensor) -> Tensor:
    """``a · gelu(b)`` for ``x = [a, b]`` along the last axis, with the exact gelu.

    Shazeer 2020, "GLU Variants Improve Transformer".
    """
    return cast("Tensor", cast("Any", _Geglu).apply(x))


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - autograd's
        x = x.contiguous()
        half = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], half)
        _forward[(triton.cdiv(y.numel(), _BLOCK),)](x, y, y.numel(), half, BLOCK=_BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401 - autograd's
        (x,) = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = torch.empty_like(x)
        _backward[(triton.cdiv(dy.numel(), _BLOCK),)](x, dy, dx, dy.numel(), x.shape[-1] // 2, BLOCK=_BLOCK)
        return dx
