"""Modules between two dialects: tensors as stored, and the scale they are read with.

Every step is exact in ΔW unless it says otherwise: rows taken or stacked, cores folded,
other algorithms written as LoRA factors. What is not changed keeps its bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.algorithms.base import Bound, Dims, MismatchError, Reading
from lycotool.algorithms.detection import (
    Detected,
    bias_change,
    detect,
    stack_rows,
    take_rows,
    weight_change,
)
from lycotool.lazy import torch
from lycotool.linalg import ranks
from lycotool.linalg.dense import best_approximation, exact
from lycotool.linalg.low_rank import LowRank, low_rank_split
from lycotool.models.naming import split_name
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._render import kernel_of, outline

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Form:
    """One module: slots without alpha in their stored dtypes, and how to read them.

    Attributes
    ----------
    alpha
        The stored alpha while the module is as it was; None once the scale says all.
    kernel
        Of the layer it changes; ``()`` for linear ones.
    stored
        The dtypes to save the slots in: what they had, however they are computed with.
    """

    slots: Mapping[str, Tensor]
    detected: Detected
    dims: Dims
    alpha: Tensor | None
    kernel: tuple[int, ...]
    stored: Mapping[str, torch.dtype]
    reading: Reading

    @property
    def scale(self) -> float:
        """``c``."""
        return self.dims.scale

    def bound(self, dtype: torch.dtype | None = None) -> Bound:
        """What formulas take, in the stored dtypes or in one."""
        tensors = {
            slot: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            for slot, tensor in self.slots.items()
        }
        return Bound(tensors, self.detected.layout, self.detected.sizes, self.dims, self.reading)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The weight's shape as far as the tensors tell, its columns flattened where they do not."""
        layout, sizes = self.detected.layout, self.detected.sizes
        rows, columns = layout.rows(sizes), layout.columns(sizes)
        if rows is None or columns is None:
            return None
        volume = math.prod(self.kernel)
        return (rows, columns) if columns % volume else (rows, columns // volume, *self.kernel)

    @property
    def has_no_matrix(self) -> bool:
        """Whether it changes a vector only: a norm, or a bias alone."""
        return "w_norm" in self.slots or self.slots.keys() <= {"diff_b"}

    def check_magnitude(self) -> None:
        """Compare the length of a DoRA magnitude with the layer's axis.

        Raises
        ------
        MismatchError
            With both.
        """
        slot, axis, shape = self.detected.dora_slot, self.detected.dora_axis, self.shape
        if slot is None or shape is None:
            return
        expected, found = shape[0 if axis == "out" else 1], self.slots[slot].numel()
        if found != expected:
            raise MismatchError(f"{slot} has {found} elements for {expected} on the {axis} axis")

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of its weights."""
        return next(dtype for dtype in self.stored.values() if dtype.is_floating_point)

    @property
    def computing(self) -> torch.dtype:
        """The dtype to compute in: float32, but float64 where that is stored."""
        return torch.float64 if torch.float64 in self.stored.values() else torch.float32

    def with_slots(
        self, slots: Mapping[str, Tensor], scale: float, *, computed: bool = False, hint: str | None = "same"
    ) -> Form:
        """Another form with these tensors, read with ``scale``.

        Parameters
        ----------
        computed
            Whether the tensors are in a dtype that is only for computing.
        hint
            What the keys do not tell of the algorithm; ``same`` is this form's.
        """
        stored = {
            slot: self.stored.get(slot, self.dtype)
            if computed and tensor.is_floating_point()
            else tensor.dtype
            for slot, tensor in slots.items()
        }
        found = detect(
            {slot: tuple(tensor.shape) for slot, tensor in slots.items()},
            algorithm_hint=self.detected.algorithm.name if hint == "same" else hint,
        )
        dims = found.algorithm.dims(found.layout, found.sizes, None, self.reading)
        return replace(
            self,
            slots=slots,
            detected=found,
            dims=replace(dims, alpha=None, scale=scale),
            alpha=None,
            stored=stored,
        )


def read_form(adapter: Adapter, module: AdapterModule, *, pointwise: tuple[str, ...] = ()) -> Form:
    """A module as it is stored.

    Parameters
    ----------
    pointwise
        Endings of the paths of 1x1 convolutions, which LoHa and LoKr store as matrices.
    """
    unused = {slot.name for slot in module.detected.layout.slots if slot.unused}
    slots = {
        slot: adapter.store.tensor(key)
        for slot, key in module.keys.items()
        if slot != "alpha" and slot not in unused
    }
    if adapter.reading.loha_cp_shared_core and "hada_t2" in slots:
        slots["hada_t2"] = slots["hada_t1"]
    alpha = adapter.store.tensor(module.keys["alpha"]) if "alpha" in module.keys else None
    kernel = kernel_of(split_name(module.name).place, [module])
    columns = outline(module)[1]
    if columns is not None and columns % math.prod(kernel):
        kernel = ()
    component, path = split_name(module.name).place
    is_lora = "lora_up.weight" in slots  # whose factors tell the layer's dimensions themselves
    if not kernel and not is_lora and component == "unet" and path.endswith(pointwise or ("\0",)):
        kernel = (1, 1)
    stored = {slot: tensor.dtype for slot, tensor in slots.items()}
    return Form(slots, module.detected, module.dims, alpha, kernel, stored, adapter.reading)


def rows_of(form: Form, index: Tensor) -> Form | None:
    """The module of these output rows, or None where its algorithm has none.

    A LoRA that was fused from parts loses the ranks that these rows do not use.
    """
    slots = take_rows(form.detected, form.bound(), index)
    if slots is None:
        return None
    taken = form.with_slots(slots, form.scale)
    if form.dims.rank is None:  # alpha is no scale then but the bound of a rotation, or is not read
        return replace(taken, alpha=form.alpha, dims=form.dims)
    return _without_empty_ranks(taken)


def _without_empty_ranks(form: Form) -> Form:
    if form.detected.layout is not lora.PLAIN:
        return form
    up, down = form.slots["lora_up.weight"], form.slots["lora_down.weight"]
    used = (up != 0).flatten(2).any(-1).any(0) if up.ndim > 2 else (up != 0).any(0)
    if bool(used.all()) or not bool(used.any()):
        return form
    slots = {**form.slots, "lora_up.weight": up[:, used], "lora_down.weight": down[used]}
    return form.with_slots(slots, form.scale)


def is_zero(form: Form) -> bool:
    """Whether a LoRA changes nothing, because its up factor is zero."""
    up = form.slots.get("lora_up.weight")
    has_more = form.slots.keys() & {"diff_b", "lora_up.bias", "bias_values"} or form.detected.dora_axis
    return up is not None and not has_more and not bool(up.any())


def stacked(parts: Sequence[Form | int]) -> Form | None:
    """One module of these rows in order; an int is so many unchanged ones."""
    first = next(part for part in parts if isinstance(part, Form))
    found = stack_rows([(p.detected, p.bound()) if isinstance(p, Form) else p for p in parts])
    if found is None:
        return None
    # What is fused from parts has lost the order of ranks that DyLoRA trains.
    return first.with_slots(*found, hint=None)


def swapped_halves(form: Form) -> Form | None:
    """The module with the lower half of its rows above the upper."""
    rows = form.detected.layout.rows(form.detected.sizes)
    if rows is None or rows % 2:
        return None
    return rows_of(form, torch.arange(rows).roll(rows // 2))


def without_core(form: Form) -> Form:
    """A CP-form LoRA as a plain one of the same rank, by folding the core into the down factor."""
    unscaled = replace(form.bound(form.computing), dims=replace(form.dims, scale=1.0))
    plain = _as_factors(form, lora.low_rank(unscaled).folded(), form.scale)
    slot = form.detected.dora_slot
    if slot is None:
        return plain
    kept = replace(plain, stored={**plain.stored, slot: form.stored[slot]})
    return kept.with_slots({**plain.slots, slot: form.slots[slot]}, form.scale, computed=True)


def as_lora(form: Form) -> Form | None:
    """The same change as LoRA factors, exactly; None where the base or a rank is needed."""
    detected = form.detected
    if detected.needs_base or form.shape is None or len(form.shape) < 2:
        return None
    if detected.layout in (lora.PLAIN, lora.CP):
        return form if detected.layout is lora.PLAIN else without_core(form)
    bound = form.bound(form.computing)
    low = None
    if detected.algorithm.factors is not None:
        low = detected.algorithm.factors(bound)
    if low is None and detected.layout is lora.SPARSE:
        low = LowRank(*low_rank_split(lora.delta(bound, form.shape, None).flatten(1)))
    if low is None:
        return None
    return _as_factors(form, low.folded().capped(), 1.0)


def approximated(
    form: Form, base: Tensor | None, *, rank: int | None, error: float | None, shape: tuple[int, ...]
) -> Form:
    """The best LoRA of a rank, or the smallest within an error of its own norm."""
    change = weight_change(form.detected, form.bound(form.computing), shape, base, strength=1.0)
    matrix = change.flatten(1)
    if error is not None:
        spectrum = exact(matrix)
        count = ranks.fro(spectrum.values, math.sqrt(1 - error**2))
        low = spectrum.truncated(count if rank is None else min(rank, count), matrix)
    else:
        low = best_approximation(matrix, rank or 1, seed=0)
    return _as_factors(replace(form, kernel=shape[2:]), low, 1.0)


def as_full(form: Form, base: Tensor | None, shape: tuple[int, ...]) -> Form:
    """The same change as a dense difference."""
    bound = form.bound(form.computing)
    slots = {"diff": weight_change(form.detected, bound, shape, base, strength=1.0)}
    bias = bias_change(form.detected, bound, strength=1.0)
    if bias is not None:
        slots["diff_b"] = bias
    return form.with_slots(slots, 1.0, computed=True)


def with_bias(form: Form) -> Form:
    """The same LoRA with a bias change, zero where it has none."""
    if form.slots.keys() & {"diff_b", "lora_up.bias"}:
        return form
    up = form.slots["lora_up.weight"]
    return form.with_slots({**form.slots, "lora_up.bias": up.new_zeros(up.shape[0])}, form.scale)


def _as_factors(form: Form, low: LowRank, scale: float) -> Form:
    """A LoRA with these factors, keeping the biases that stand beside them."""
    kernel = form.kernel
    if low.down.shape[1] % math.prod(kernel):
        raise MismatchError(f"{low.down.shape[1]} columns have no kernel {kernel}")
    slots = {
        slot: tensor
        for slot, tensor in lora.from_factors(low, kernel, torch.float32).items()
        if slot != "alpha"
    }
    bias = bias_change(form.detected, form.bound(form.computing), strength=1.0)
    if bias is not None:
        slots["diff_b"] = bias
    return form.with_slots(slots, scale, computed=True)
