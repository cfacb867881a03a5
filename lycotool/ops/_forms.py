"""How each algorithm stores the difference of one layer.

Every form is judged by what was really stored: it returns the saved slots, rounded to their
dtype, and what they leave of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lycotool.algorithms import dora, lora
from lycotool.errors import IncompatibleError
from lycotool.io.writer import TensorPlan
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.dense import best_approximation, exact, leading, nearest_kronecker, tucker
from lycotool.linalg.direction import nearest_direction
from lycotool.linalg.factorization import factorization
from lycotool.linalg.low_rank import LowRank, kron
from lycotool.linalg.underflow import Underflow
from lycotool.ops._common import cast_batch_checked, cast_checked
from lycotool.ops._pairs import Pair
from lycotool.ops._render import alpha_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.ops.extract import ExtractOptions

#: Rank rules by `--mode`.
MODE_RULES: Mapping[str, str] = {
    "fixed": "fixed", "threshold": "threshold", "ratio": "sv_ratio", "quantile": "sv_cumulative", "fro": "sv_fro",
}  # fmt: skip

#: The rank of mode fixed when none is given.
DEFAULT_RANK = 32


@dataclass(frozen=True, slots=True)
class Stored:
    """A layer's module: slots in their saved dtypes, what it is, ``‖Δ‖²`` and what it leaves of it."""

    slots: dict[str, Tensor]
    type: str
    rank: int | None
    total: float
    left: float


@dataclass(frozen=True, slots=True)
class Difference:
    """One layer's ``delta = tuned - base``.

    ``base`` is kept for the forms that need it (:attr:`Forms.needs_base`). ``dtype`` is the
    one to save in, ``rounding`` the eps of the one ``tuned`` is stored in; ``underflow`` is told
    what becomes zero.
    """

    pair: Pair
    delta: Tensor
    base: Tensor | None
    dtype: str
    rounding: float
    underflow: Underflow

    def save(self, tensor: Tensor, slot: str) -> Tensor:
        """Round to the saved dtype, refusing overflow."""
        return save(tensor, self.dtype, self.pair, slot, self.underflow)

    def stored(self, slots: dict[str, Tensor], kind: str, rank: int | None, left: Tensor) -> Stored:
        """What :class:`Forms` returns, from what the slots leave of the difference."""
        return Stored(slots, kind, rank, square(self.delta), square(left))


def save(tensor: Tensor, dtype: str, pair: Pair, slot: str, underflow: Underflow) -> Tensor:
    """A tensor of one layer's module rounded to its saved dtype, on the CPU; refuses overflow."""
    key = f"{pair.name}.{slot}"
    return cast_checked(tensor, dtype, path=pair.tuned.path, key=key, underflow=underflow).cpu()


def square(tensor: Tensor) -> float:
    """``‖x‖²``, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


@dataclass(slots=True)
class Forms:
    """The form that the options choose for a layer.

    Attributes
    ----------
    ranks
        Ranks by module name, where a budget over all layers decided them.
    unfit
        Layers that the form cannot stand for: share of the change it leaves, and name.
    underflow
        What became zero where it was stored.
    """

    options: ExtractOptions
    ranks: dict[str, int] = field(default_factory=dict)
    unfit: list[tuple[float, str]] = field(default_factory=list)
    underflow: Underflow = field(default_factory=Underflow)

    @property
    def needs_base(self) -> bool:
        """Whether the form depends on the base weight beside the difference."""
        return self.options.algo in ("dora", "ia3")

    def kind(self, pair: Pair, dtype: str) -> Hashable | None:
        """Equal for layers that :meth:`store_alike` may store together; None for one that stands alone.

        ``dtype`` is the one to save in.
        """
        options = self.options
        is_plain = options.algo == "lora" and options.mode == "fixed" and pair.is_matrix
        if not is_plain or options.sparse_bias:
            return None
        if options.use_conv_cp and pair.is_convolution:
            return None
        rows, *columns = pair.base.weight.shape
        return rows, math.prod(columns), dtype, self.cap(pair)

    def store_alike(self, pairs: Sequence[Pair], deltas: Tensor, dtype: str) -> list[Stored]:
        """:meth:`_lora` of layers of one :meth:`kind`, in a few large calls.

        ``deltas`` is ``(layers, out, in·kernel)``.
        """
        found = leading(deltas, self.cap(pairs[0]), seed=self.options.seed)
        names, path = [pair.name for pair in pairs], pairs[0].tuned.path
        ups, downs = (
            cast_batch_checked(
                side, dtype, path=path, keys=[f"{name}.{slot}" for name in names], underflow=self.underflow
            )
            for slot, side in zip(
                ("lora_up.weight", "lora_down.weight"), self._clamped(found.up, found.down), strict=True
            )
        )
        left = torch.baddbmm(deltas, ups.to(deltas), downs.to(deltas), alpha=-1)
        totals, rests = (
            torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64).square().tolist()
            for x in (deltas, left)
        )
        return [
            Stored(
                _lora_slots(LowRank(up, down), pair.base.weight.shape[2:]), "lora", up.shape[1], total, rest
            )
            for pair, up, down, total, rest in zip(pairs, ups.cpu(), downs.cpu(), totals, rests, strict=True)
        ]

    def store(self, layer: Difference) -> Stored:
        """Store one layer's difference."""
        if not layer.pair.is_matrix:
            is_norm = layer.delta.ndim == 1 and layer.pair.base.bias is not None
            return self._dense(layer, "w_norm" if is_norm else "diff")
        if self.options.algo == "full" or self.options.mode == "full":
            return self._dense(layer, "diff")
        if self.options.algo == "lokr":
            return self._lokr(layer)
        if self.options.algo == "dora":
            return self._dora(layer)
        if self.options.algo == "ia3":
            return self._ia3(layer)
        return self._lora(layer)

    def slots_at_rank_1(self, layer: Difference) -> dict[str, TensorPlan]:
        """What :meth:`store` gives at rank 1, as plans: dtype and shape of each slot."""
        shape, dtype = tuple(layer.delta.shape), layer.dtype
        if not layer.pair.is_matrix:
            return {"diff": TensorPlan(dtype, shape)}
        ones = (1,) * (len(shape) - 2)
        slots = {
            "lora_up.weight": TensorPlan(dtype, (shape[0], 1, *ones)),
            "lora_down.weight": TensorPlan(dtype, (1, *shape[1:])),
            "alpha": TensorPlan("F32", ()),
        }
        if self.options.sparse_bias:
            count = self._sparse_count(layer.delta.numel())
            slots["bias_indices"] = TensorPlan("I16", (2, count))
            slots["bias_values"] = TensorPlan(dtype, (count,))
            slots["bias_size"] = TensorPlan("I16", (2,))
        return slots

    def _sparse_count(self, numel: int) -> int:
        """How many entries the sparse part keeps."""
        return max(1, round((1 - self.options.sparsity) * numel))

    def _dense(self, layer: Difference, slot: str) -> Stored:
        saved = layer.save(layer.delta, slot)
        label = "norm" if slot == "w_norm" else "full"
        return layer.stored({slot: saved}, label, None, layer.delta - saved.to(layer.delta))

    def _lora(self, layer: Difference) -> Stored:
        options, delta = self.options, layer.delta
        if options.use_conv_cp and layer.pair.is_convolution:
            up, core, down = tucker(delta, self.cap(layer.pair), seed=options.seed)
            low = LowRank(up, down, core)
        else:
            low = self._truncated(layer.pair, delta.flatten(1))
        low = LowRank(*self._clamped(low.up, low.down), low.core)
        slots = _saved_factors(layer, low)
        change = _change(slots).to(delta).reshape(delta.shape)
        if options.sparse_bias:
            sparse, matrix = self._sparse(layer, (delta - change).flatten(1))
            slots |= sparse
            change = change + matrix.reshape(delta.shape)
        label = "lora (cp)" if low.core is not None else "lora"
        return layer.stored(slots, label, low.rank, delta - change)

    def _clamped(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors (or stacks of them) cut at a quantile of their absolute values, where asked for."""
        quantile = self.options.clamp_quantile
        if quantile is None:
            return up, down
        values = torch.cat([up.flatten(-2), down.flatten(-2)], dim=-1).abs()
        limit = values.kthvalue(max(1, math.ceil(quantile * values.shape[-1])), dim=-1).values[
            ..., None, None
        ]
        return up.clamp(-limit, limit), down.clamp(-limit, limit)

    def _truncated(self, pair: Pair, matrix: Tensor) -> LowRank:
        """The best approximation of the rank that mode and cap choose."""
        options = self.options
        if options.mode == "fixed":
            return best_approximation(matrix, self.cap(pair), seed=options.seed)
        spectrum = exact(matrix)
        if pair.name in self.ranks:
            return spectrum.truncated(self.ranks[pair.name], matrix)
        parameter = options.parameter or 0.0
        if pair.is_convolution and options.conv_parameter is not None:
            parameter = options.conv_parameter
        value = 1 / parameter if options.mode == "ratio" else parameter
        rank = ranks.RULES[MODE_RULES[options.mode]](spectrum.values, value)
        return spectrum.truncated(min(rank, self.cap(pair)), matrix)

    def cap(self, pair: Pair) -> int:
        """The rank of mode fixed, and the most that the other modes may choose."""
        options, shape = self.options, pair.base.weight.shape
        rank = options.rank
        if pair.is_convolution and options.conv_rank is not None:
            rank = options.conv_rank
        if rank is None and options.mode == "fixed":
            rank = DEFAULT_RANK
        most = min(shape[0], math.prod(shape[1:]))
        return most if rank is None else min(rank, most)

    def _sparse(self, layer: Difference, residual: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The largest entries of what the factors leave, and the matrix they make."""
        if max(residual.shape) > 65536:
            raise IncompatibleError(
                f"a sparse part addresses 65536 rows and columns at most, this layer is {list(residual.shape)}",
                key=layer.pair.name,
            )
        count = self._sparse_count(residual.numel())
        flat = residual.flatten()
        chosen = flat.abs().topk(count, sorted=False).indices.sort().values
        values = layer.save(flat[chosen], "bias_values")
        matrix = torch.zeros_like(flat)
        matrix[chosen] = values.to(matrix)
        columns = residual.shape[1]
        slots = {
            "bias_indices": _as_int16(torch.stack([chosen // columns, chosen % columns])),
            "bias_values": values,
            "bias_size": _as_int16(torch.tensor(residual.shape)),
        }
        return slots, matrix

    def _lokr(self, layer: Difference) -> Stored:
        delta = layer.delta
        a, b = factorization(delta.shape[0], self.options.factor)
        c, d = factorization(delta.shape[1], self.options.factor)
        w1, w2 = nearest_kronecker(delta.flatten(1), (a, c))
        slots = {"lokr_w1": layer.save(w1, "lokr_w1")}
        rank = None
        if self.options.rank is None:
            slots["lokr_w2"] = layer.save(w2.reshape(b, d, *delta.shape[2:]), "lokr_w2")
            second = slots["lokr_w2"].to(delta).flatten(1)
        else:
            low = best_approximation(w2, self.cap(layer.pair), seed=self.options.seed)
            rank = low.rank
            slots |= {
                slot: layer.save(x, slot) for slot, x in (("lokr_w2_a", low.up), ("lokr_w2_b", low.down))
            }
            second = slots["lokr_w2_a"].to(delta) @ slots["lokr_w2_b"].to(delta)
        slots["alpha"] = alpha_tensor(float(rank or 1), slots)
        product = kron(slots["lokr_w1"].to(delta), second)
        return layer.stored(slots, "lokr", rank, delta - product.reshape(delta.shape))

    def _dora(self, layer: Difference) -> Stored:
        base, delta, axis = _base(layer), layer.delta, self.options.dora_axis
        low, magnitude = nearest_direction(
            base, base + delta, 0 if axis == "out" else 1, self.cap(layer.pair), seed=self.options.seed
        )
        slots = _saved_factors(layer, low)
        slots["dora_scale"] = layer.save(magnitude, "dora_scale")
        change = dora.delta(
            slots["dora_scale"].to(delta),
            axis,
            _change(slots).to(delta).reshape(delta.shape),
            base,
            strength=1.0,
            convention="linear",
        )
        return layer.stored(slots, f"lora + dora ({axis})", low.rank, delta - change)

    def _ia3(self, layer: Difference) -> Stored:
        """A scaling of rows or of columns, whichever leaves less; noted as unfit if it leaves much."""
        base, delta = _base(layer), layer.delta
        scalings = [_nearest_scaling(base, delta, axis) for axis in (0, 1)]
        axis = min((0, 1), key=lambda axis: square(delta - scalings[axis] * base))
        vector = scalings[axis]
        rest = square(delta - vector * base)
        # Rounding the scaled weight to its dtype leaves at most eps/2 of each element.
        if rest > square(layer.rounding * (base + delta)):
            share = math.sqrt(rest / square(delta))
            self.unfit.append((share, layer.pair.name))
        shape = [1, -1] + [1] * (base.ndim - 2) if base.ndim > 2 else [-1]
        slots = {
            "weight": layer.save(vector.reshape(shape), "weight"),
            "on_input": torch.tensor(axis, dtype=torch.int64),
        }
        left = delta - slots["weight"].to(delta).reshape(vector.shape) * base
        return layer.stored(slots, "ia3", None, left)


def _nearest_scaling(base: Tensor, delta: Tensor, axis: int) -> Tensor:
    """The vector ``w`` along an axis that minimises ``‖Δ - w ∘ W‖``."""
    others = [dim for dim in range(base.ndim) if dim != axis]
    power = (base * base).sum(others, keepdim=True)
    tiny = torch.finfo(base.dtype).tiny
    return (delta * base).sum(others, keepdim=True) / power.clamp_min(tiny)


def _base(layer: Difference) -> Tensor:
    """The base weight of a layer that was read with it."""
    if layer.base is None:
        raise TypeError(layer.pair.name)
    return layer.base


def _saved_factors(layer: Difference, low: LowRank) -> dict[str, Tensor]:
    """A LoRA's slots with ``c = 1``."""
    core = None if low.core is None else layer.save(low.core, "lora_mid.weight")
    saved = LowRank(layer.save(low.up, "lora_up.weight"), layer.save(low.down, "lora_down.weight"), core)
    return _lora_slots(saved, layer.delta.shape[2:])


def _lora_slots(saved: LowRank, kernel: Sequence[int]) -> dict[str, Tensor]:
    """The slots of factors in their saved dtype."""
    factors = lora.from_factors(saved, tuple(kernel), torch.float32)
    alpha = float(factors.pop("alpha"))
    return {**factors, "alpha": alpha_tensor(alpha, factors)}


def _change(slots: Mapping[str, Tensor]) -> Tensor:
    """The change the saved factors give."""
    core = slots["lora_mid.weight"].float() if "lora_mid.weight" in slots else None
    up, down = slots["lora_up.weight"].float().flatten(1), slots["lora_down.weight"].float().flatten(1)
    return LowRank(up, down, core).dense()


def _as_int16(values: Tensor) -> Tensor:
    """As int16 modulo 65536, which is how the format stores indices and sizes."""
    return ((values.cpu() + 32768) % 65536 - 32768).to(torch.int16)
