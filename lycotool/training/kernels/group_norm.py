"""``silu(group_norm(x))`` of channels-last images, without transposing them.

Three passes: moments of tiles, moments of groups from those of their tiles (Chan's formula, which
keeps the digits of a small variance beside a large mean), and the result. The gradient of the
input has the same shape. Weight and bias are frozen and have no gradient.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows (positions) and channels of a tile: 128 bytes of half precision along the channels.
_ROWS, _CHANNELS = 64, 64


@triton.jit
def _moments(x, mean, m2, positions, channels, tiles, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of each channel in a tile of rows."""
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < positions)[:, None] & (channel < channels)[None, :]
    place = (image * positions + row).to(tl.int64)[:, None] * channels + channel[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
    average = tl.sum(values, 0) / count
    deviation = tl.where(inside, values - average[None, :], 0.0)
    out = (image * tiles + tile) * channels + channel
    tl.store(mean + out, average, mask=channel < channels)
    tl.store(m2 + out, tl.sum(deviation * deviation, 0), mask=channel < channels)


@triton.jit
def _group_moments(
    mean, m2, group_mean, group_rstd, positions, channels, tiles, groups, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Mean and ``1/√(variance + eps)`` of a group from the moments of its tiles and channels."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    member = tl.arange(0, SPAN)
    channel = group * WIDTH + member
    total = tl.zeros((TILES, SPAN), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (member < WIDTH)[None, :]
        place = (image * tiles + tile)[:, None] * channels + channel[None, :]
        count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)[:, None]
        total += count * tl.load(mean + place, mask=inside, other=0.0)
    size = positions * WIDTH * 1.0
    average = tl.sum(tl.sum(total, 1), 0) / size
    squares = tl.zeros((TILES, SPAN), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (member < WIDTH)[None, :]
        place = (image * tiles + tile)[:, None] * channels + channel[None, :]
        count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)[:, None]
        away = tl.load(mean + place, mask=inside, other=0.0) - average
        squares += tl.where(inside, tl.load(m2 + place, mask=inside, other=0.0) + count * away * away, 0.0)
    variance = tl.sum(tl.sum(squares, 1), 0) / size
    tl.store(group_mean + tl.program_id(0), average)
    tl.store(group_rstd + tl.program_id(0), 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalise(
    x, y, weight, bias, group_mean, group_rstd, positions, channels, tiles, groups, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``z = (x - mean)·rstd·w + b``, and ``z·sigmoid(z)`` of it."""
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    inside = (row < positions)[:, None] & known[None, :]
    place = (image * positions + row).to(tl.int64)[:, None] * channels + channel[None, :]
    group = image * groups + channel // width
    mean = tl.load(group_mean + group, mask=known, other=0.0)
    rstd = tl.load(group_rstd + group, mask=known, other=0.0)
    scale = rstd * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    z = (values - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + place, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _at_the_normal(
    x, dy, weight, bias, place, channel, known, inside, mean, rstd, SILU: tl.constexpr,
):  # fmt: skip
    """``x̂ = (x - mean)·rstd`` and the gradient at it, ``g``, which is 0 outside."""
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
        z = normal * scale[None, :] + shift[None, :]
        s = tl.sigmoid(z)
        gradient = gradient * (s + z * s * (1.0 - s))
    return normal, tl.where(inside, gradient * scale[None, :], 0.0)


@triton.jit
def _backward_sums(
    x, dy, weight, bias, group_mean, group_rstd, sums, products, positions, channels, tiles, groups, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``Σ g`` and ``Σ g·x̂`` of each channel in a tile, with g the gradient of the normalised x̂."""
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    inside = (row < positions)[:, None] & known[None, :]
    place = (image * positions + row).to(tl.int64)[:, None] * channels + channel[None, :]
    group = image * groups + channel // width
    mean = tl.load(group_mean + group, mask=known, other=0.0)
    rstd = tl.load(group_rstd + group, mask=known, other=0.0)
    normal, gradient = _at_the_normal(
        x, dy, weight, bias, place, channel, known, inside, mean, rstd, SILU=SILU
    )
    out = (image * tiles + tile) * channels + channel
    tl.store(sums + out, tl.sum(gradient, 0), mask=known)
    tl.store(products + out, tl.sum(gradient * normal, 0), mask=known)


@triton.jit
def _group_sums(
    sums, products, group_sum, group_product, positions, channels, tiles, groups,
    WIDTH: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The means of both over each group."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    member = tl.arange(0, SPAN)
    channel = group * WIDTH + member
    first_total = tl.zeros((TILES, SPAN), tl.float32)
    second_total = tl.zeros((TILES, SPAN), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (member < WIDTH)[None, :]
        place = (image * tiles + tile)[:, None] * channels + channel[None, :]
        first_total += tl.load(sums + place, mask=inside, other=0.0)
        second_total += tl.load(products + place, mask=inside, other=0.0)
    size = positions * WIDTH * 1.0
    tl.store(group_sum + tl.program_id(0), tl.sum(tl.sum(first_total, 1), 0) / size)
    tl.store(group_product + tl.program_id(0), tl.sum(tl.sum(second_total, 1), 0) / size)


@triton.jit
def _backward(
    x, dy, dx, weight, bias, group_mean, group_rstd, group_sum, group_product, positions, channels, tiles, groups,
    width, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dx = rstd·(g - mean(g) - x̂·mean(g·x̂))``."""
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    inside = (row < positions)[:, None] & known[None, :]
    place = (image * positions + row).to(tl.int64)[:, None] * channels + channel[None, :]
    group = image * groups + channel // width
    mean = tl.load(group_mean + group, mask=known, other=0.0)
    rstd = tl.load(group_rstd + group, mask=known, other=0.0)
    first = tl.load(group_sum + group, mask=known, other=0.0)
    second = tl.load(group_product + group, mask=known, other=0.0)
    normal, gradient = _at_the_normal(
        x, dy, weight, bias, place, channel, known, inside, mean, rstd, SILU=SILU
    )
    result = rstd[None, :] * (gradient - first[None, :] - normal * second[None, :])
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool) -> Tensor:
    """``silu(group_norm(x))`` or without silu, differentiable in x.

    Parameters
    ----------
    x
        ``(B, C, H, W)``; copied if it is not channels last, as the result is.
    weight, bias
        ``(C,)``, without gradients.
    """
    return cast("Tensor", cast("Any", _GroupNorm).apply(x, groups, weight, bias, eps, silu))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        silu: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        sizes = _Sizes(x, groups)
        mean, m2 = sizes.per_tile(), sizes.per_tile()
        _moments[sizes.tiled](
            x, mean, m2, sizes.positions, sizes.channels, sizes.tiles, ROWS=_ROWS, CHANNELS=_CHANNELS
        )
        group_mean, group_rstd = sizes.per_group(), sizes.per_group()
        _group_moments[sizes.grouped](
            mean, m2, group_mean, group_rstd, sizes.positions, sizes.channels, sizes.tiles, groups, eps,
            WIDTH=sizes.width, ROWS=_ROWS, TILES=sizes.loop, SPAN=sizes.span,
        )  # fmt: skip
        y = torch.empty_like(x)
        _normalise[sizes.tiled](
            x, y, weight, bias, group_mean, group_rstd, sizes.positions, sizes.channels, sizes.tiles, groups,
            sizes.width, SILU=silu, ROWS=_ROWS, CHANNELS=_CHANNELS,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, group_mean, group_rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        x, weight, bias, group_mean, group_rstd = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        sizes = _Sizes(x, ctx.groups)
        sums, products = sizes.per_tile(), sizes.per_tile()
        _backward_sums[sizes.tiled](
            x, dy, weight, bias, group_mean, group_rstd, sums, products, sizes.positions, sizes.channels,
            sizes.tiles, ctx.groups, sizes.width, SILU=ctx.silu, ROWS=_ROWS, CHANNELS=_CHANNELS,
        )  # fmt: skip
        group_sum, group_product = sizes.per_group(), sizes.per_group()
        _group_sums[sizes.grouped](
            sums, products, group_sum, group_product, sizes.positions, sizes.channels, sizes.tiles, ctx.groups,
            WIDTH=sizes.width, TILES=sizes.loop, SPAN=sizes.span,
        )  # fmt: skip
        dx = torch.empty_like(x)
        _backward[sizes.tiled](
            x, dy, dx, weight, bias, group_mean, group_rstd, group_sum, group_product, sizes.positions,
            sizes.channels, sizes.tiles, ctx.groups, sizes.width, SILU=ctx.silu, ROWS=_ROWS, CHANNELS=_CHANNELS,
        )  # fmt: skip
        return dx, None, None, None, None, None


class _Sizes:
    """How images are cut into tiles and groups."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.images, self.channels = x.shape[0], x.shape[1]
        self.positions = x.shape[2] * x.shape[3]
        self.groups, self.width = groups, x.shape[1] // groups
        self.tiles = triton.cdiv(self.positions, _ROWS)
        self.tiled = (self.images * self.tiles, triton.cdiv(self.channels, _CHANNELS))
        self.grouped = (self.images * groups,)
        self.span = triton.next_power_of_2(self.width)
        self.loop = max(1, min(triton.next_power_of_2(self.tiles), 4096 // self.span))
        self._device = x.device

    def per_tile(self) -> Tensor:
        """A number for each channel of each tile."""
        return torch.empty(self.images * self.tiles * self.channels, dtype=torch.float32, device=self._device)

    def per_group(self) -> Tensor:
        """A number for each group of each image."""
        return torch.empty(self.images * self.groups, dtype=torch.float32, device=self._device)
