"""Proof that nothing was lost: ΔW of what was read against ΔW of what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank, concat
from lycotool.ops._convert_forms import Form

if TYPE_CHECKING:
    from torch import Tensor

#: Columns or rows of the layer where the tensors of a module do not tell how many it has.
_ANY_SIZE = 8


#: Slots that change a bias.
_BIASES = frozenset({"diff_b", "b_norm", "lora_up.bias"})


@dataclass(frozen=True, slots=True)
class Claim:
    """That some rows of a written module change a layer as some rows of a read one did.

    ``read`` None says that the written rows change nothing. Rows are index tensors, None for
    all. ``base`` is the layer's weight where one is known.
    """

    read: Form | None
    read_rows: Tensor | None
    written: Form
    written_rows: Tensor | None
    base: Tensor | None = None


def relative_difference(claims: Sequence[Claim]) -> float:
    """``‖ΔW_read - ΔW_written‖ / ‖ΔW_read‖`` over some claims together, biases included."""
    lost = total = 0.0
    for claim in claims:
        missing, norm = _squares(claim)
        lost, total = lost + missing, total + norm
    if total == 0:
        return 0.0 if lost == 0 else math.inf
    return math.sqrt(lost / total)


def same_bits(read: Form, written: Form) -> bool:
    """Whether two modules have equal tensors and are read with the same scale."""
    return (
        read.slots.keys() == written.slots.keys()
        and read.scale == written.scale
        and all(
            tensor.dtype == written.slots[slot].dtype and torch.equal(tensor, written.slots[slot])
            for slot, tensor in read.slots.items()
        )
    )


def _squares(claim: Claim) -> tuple[float, float]:
    """Squared norms of the difference and of what was read."""
    if claim.read is None:
        change = _dense(claim.written, _base_for(claim.written, None))
        rows = change if claim.written_rows is None else change[claim.written_rows]
        return _square(rows), 0.0
    found = _with_equal_downs(claim, claim.read)
    if found is None:
        one, two = _factors(claim.read, claim.read_rows), _factors(claim.written, claim.written_rows)
        if one is not None and two is not None:
            both = LowRank(torch.cat([one.up, -two.up], 1), torch.cat([one.down, two.down]))
            found = _low_rank_square(both), _low_rank_square(one)
        else:
            found = _dense_squares(claim, claim.read)
    lost, norm = found
    bias_lost, bias_norm = _bias_squares(claim, claim.read)
    return lost + bias_lost, norm + bias_norm


def _with_equal_downs(claim: Claim, read: Form) -> tuple[float, float] | None:
    """``‖(up₁ - up₂) @ down‖²`` and ``‖up₁ @ down‖²`` of two LoRAs that share ``down``, in float32.

    The commonest case by far: names changed, a scale folded, rows split. Nothing cancels, so
    float32 is enough.
    """
    forms = (read, claim.written)
    if any(form.detected.layout is not lora.PLAIN or form.detected.dora_slot for form in forms):
        return None
    downs = [form.slots["lora_down.weight"].flatten(1) for form in forms]
    if downs[0].shape != downs[1].shape or not torch.equal(downs[0], downs[1].to(downs[0].dtype)):
        return None
    one, two = (form.slots["lora_up.weight"].flatten(1).to(read.computing) * form.scale for form in forms)
    one = one if claim.read_rows is None else one[claim.read_rows]
    two = two if claim.written_rows is None else two[claim.written_rows]
    if not bool((one - two).any()):
        return 0.0, 0.0  # nothing is lost of it; its norm shall not hide what another claim lost
    down = downs[0].to(read.computing)
    inner = down @ down.T
    lost, norm = (max(0.0, float(((up.T @ up) * inner).sum())) for up in (one - two, one))
    return lost, norm


def _factors(form: Form, rows: Tensor | None) -> LowRank | None:
    """The change's factors in float64 where they are thin, else None."""
    detected = form.detected
    if detected.needs_base or detected.algorithm.factors is None or form.shape is None:
        return None
    if 3 * (form.dims.rank or 0) ** (1 if "lora_up.weight" in form.slots else 2) > min(
        form.shape[0], math.prod(form.shape[1:])
    ):
        return None
    low = detected.algorithm.factors(form.bound(torch.float64))
    if low is None:
        return None
    low = low.folded()
    return low if rows is None else LowRank(low.up[rows], low.down)


def _low_rank_square(low: LowRank) -> float:
    """``‖up @ down‖²`` as the sum of ``(upᵀ up) ∘ (down downᵀ)``."""
    return max(0.0, float(((low.up.T @ low.up) * (low.down @ low.down.T)).sum()))


def _dense_squares(claim: Claim, read: Form) -> tuple[float, float]:
    base = _base_for(read, claim.base)
    written_base = base
    if claim.read_rows is not None:
        written_base = base[claim.read_rows]
    if claim.written_rows is not None:  # the read rows are some of a larger written layer
        written_base = _embedded(base, claim.written, claim.written_rows)
    one, two = _dense(read, base), _dense(claim.written, written_base)
    one = one if claim.read_rows is None else one[claim.read_rows]
    two = two if claim.written_rows is None else two[claim.written_rows]
    return _square(one.flatten(1) - two.flatten(1)), _square(one)


def _dense(form: Form, base: Tensor) -> Tensor:
    return weight_change(form.detected, form.bound(torch.float64), tuple(base.shape), base, strength=1.0)


def _base_for(form: Form, base: Tensor | None) -> Tensor:
    """The layer's weight, or a random one: a change that depends on it has to agree for any."""
    if base is not None:
        return base.double()
    layout, sizes = form.detected.layout, form.detected.sizes
    rows, columns = layout.rows(sizes), layout.columns(sizes)
    shape = form.shape or (rows or _ANY_SIZE, columns or _ANY_SIZE)
    if form.shape is None and rows is not None and columns is None:
        shape = (rows, _ANY_SIZE)
    if "on_input" in form.slots:
        shape = (form.slots["weight"].numel(),) * 2
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _embedded(base: Tensor, written: Form, rows: Tensor) -> Tensor:
    """A layer of the written module's height with ``base`` in some rows."""
    height = written.detected.layout.rows(written.detected.sizes) or int(rows.max()) + 1
    whole = base.new_ones(height, *base.shape[1:])
    whole[rows] = base
    return whole


def _bias_squares(claim: Claim, read: Form) -> tuple[float, float]:
    if not _BIASES & (read.slots.keys() | claim.written.slots.keys()):
        return 0.0, 0.0
    one = bias_change(read.detected, read.bound(torch.float64), strength=1.0)
    two = bias_change(claim.written.detected, claim.written.bound(torch.float64), strength=1.0)
    one = one[claim.read_rows] if one is not None and claim.read_rows is not None else one
    two = two[claim.written_rows] if two is not None and claim.written_rows is not None else two
    norm = 0.0 if one is None else _square(one)
    if one is None or two is None:
        return norm + (0.0 if two is None else _square(two)), norm
    return _square(one - two), norm


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """Squared norms of a module's changes, of weight and bias together.

    Attributes
    ----------
    lost
        Of what was written minus what should have been.
    norm
        Of what should have been.
    terms
        The sum of those of its terms: what rounding is relative to where terms cancel.
    """

    lost: float
    norm: float
    terms: float


def compare_sums(terms: Sequence[tuple[Form, float]], written: Form, base: Tensor | None) -> Comparison:
    """``Σ weight · ΔW`` of some modules against the module that was written for it, in float64.

    Parameters
    ----------
    base
        The layer's weight; None takes a random one, for which the changes have to agree too.
    """
    factors = [(_factors(form, None), weight) for form, weight in terms]
    result = _factors(written, None)
    lows = [low.scaled(weight) for low, weight in factors if low is not None]
    if result is not None and len(lows) == len(terms):
        difference = concat([*lows, result.scaled(-1.0)])
        lost, norm = _low_rank_square(difference), _low_rank_square(concat(lows))
        found = Comparison(lost, norm, sum(map(_low_rank_square, lows)))
    else:
        weight = _base_for(terms[0][0], base)
        changes = [_weight(form, weight, strength) for form, strength in terms]
        found = _compared(changes, _weight(written, weight, 1.0))
    biases = [
        change
        for form, weight in terms
        if (change := bias_change(form.detected, form.bound(torch.float64), strength=weight)) is not None
    ]
    return _with_bias(found, biases, written)


def compare_changes(
    weight: Tensor | None, bias: Tensor | None, written: Form, base: Tensor | None
) -> Comparison:
    """Changes of a weight and a bias against the module that was written for them."""
    if weight is None:
        found = Comparison(0.0, 0.0, 0.0)
    else:
        expected = weight.cpu().double()
        layer = torch.zeros_like(expected) if base is None else base.cpu().double().reshape(expected.shape)
        found = _compared([expected], _weight(written, layer, 1.0))
    return _with_bias(found, [] if bias is None else [bias.cpu().double()], written)


def _weight(form: Form, base: Tensor, strength: float) -> Tensor:
    return weight_change(form.detected, form.bound(torch.float64), tuple(base.shape), base, strength=strength)


def _compared(changes: Sequence[Tensor], written: Tensor) -> Comparison:
    total = sum(changes[1:], changes[0])
    lost = _square(total.flatten() - written.flatten())
    return Comparison(lost, _square(total), sum(map(_square, changes)))


def _with_bias(found: Comparison, biases: Sequence[Tensor], written: Form) -> Comparison:
    result = bias_change(written.detected, written.bound(torch.float64), strength=1.0)
    if result is None and not biases:
        return found
    changes = list(biases) or [torch.zeros_like(result)]  # type: ignore[arg-type]
    other = _compared(changes, torch.zeros_like(changes[0]) if result is None else result)
    return Comparison(found.lost + other.lost, found.norm + other.norm, found.terms + other.terms)
