"""The sum of the modules that several adapters have for one layer; see :mod:`lycotool.ops.merge`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.algorithms.base import Bound, MismatchError, Shape
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError
from lycotool.io.dtypes import from_torch
from lycotool.io.store import TensorStore
from lycotool.lazy import torch
from lycotool.linalg.low_rank import concat
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._common import WriteOptions, cast_checked, listed, saved_dtype
from lycotool.ops._render import alpha_tensor, common_dtype, kept_form, kernel_of, outline

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's module at one place, with its weight in the sum."""

    adapter: Adapter
    module: AdapterModule
    weight: float


@dataclass(frozen=True, slots=True)
class Merged:
    """A module of the result: slots in their saved dtypes, and what it is."""

    slots: dict[str, Tensor]
    label: str
    rank: int | None


class Merger:
    """Sums the modules of one place after the other, on one device."""

    def __init__(self, options: WriteOptions, base: TensorStore | None) -> None:
        self._options = options
        self._device = resolve_device(options.device)
        self._base = base
        self._layers = LayerIndex(base.shapes) if base is not None else None
        self.warnings: list[str] = []

    def check(self, groups: Mapping[tuple[str, str], Sequence[Part]]) -> None:
        """Find what cannot be merged before any tensor is read.

        Raises
        ------
        IncompatibleError
            Listing modules of different sizes, and modules that need a base.
        """
        faults: list[str] = []
        baseless: list[str] = []
        for parts in groups.values():
            sizes = {outline(part.module) for part in parts}
            for axis, name in enumerate(("rows", "columns")):
                found = {size[axis] for size in sizes if size[axis] is not None}
                if len(found) > 1:
                    text = " and ".join(str(size) for size in sorted(s for s in found if s is not None))
                    faults.append(f"{parts[0].module.name}: {name} differ: {text}")
            if self._layers is None and not _is_baseless(parts):
                baseless.append(parts[0].module.name)
        if faults:
            raise IncompatibleError("the adapters are for different layers", details=listed(faults))
        if baseless:
            raise IncompatibleError(
                f"{len(baseless)} modules change the weight by an amount that depends on it",
                details=listed(baseless),
                hint="`--base CHECKPOINT` gives the weights, or `lycotool bake` folds each adapter",
            )

    def merge(self, place: tuple[str, str], parts: Sequence[Part]) -> Merged:
        """``Σ weight · ΔW`` as one module."""
        dtype = saved_dtype(self._options.dtype, common_dtype((p.adapter, p.module) for p in parts))
        if len(parts) == 1 and _keeps_form(parts[0]):
            return self._kept(parts[0])
        bounds = [
            (part.adapter.load(part.module, self._device, torch.float32), part.weight) for part in parts
        ]
        try:
            return (
                self._closed(parts, bounds, dtype)
                or self._low_rank(place, parts, bounds, dtype)
                or (self._dense(place, parts, bounds, dtype))
            )
        except MismatchError as error:
            raise IncompatibleError(
                str(error), path=parts[0].adapter.path, key=parts[0].module.name
            ) from None

    def _kept(self, part: Part) -> Merged:
        """One adapter's module in its own form, its weight folded into one factor."""
        part.adapter.load(part.module, self._device, torch.float32)  # refuses NaN and Inf
        slots = kept_form(part.adapter, part.module, weight=part.weight, save=self._cast)
        return Merged(slots, part.module.detected.label, part.module.dims.rank)

    def _closed(self, parts: Sequence[Part], bounds: list[tuple[Bound, float]], dtype: str) -> Merged | None:
        """The sum in the parts' own form, where the algorithm is closed under addition."""
        algorithm = parts[0].module.detected.algorithm
        if algorithm.concat is None or any(
            part.module.detected.algorithm is not algorithm or part.module.detected.dora_slot
            for part in parts
        ):
            return None
        slots = algorithm.concat(bounds)
        if slots is None:
            return None
        return self._saved(slots, dtype, parts, algorithm.name)

    def _low_rank(
        self, place: tuple[str, str], parts: Sequence[Part], bounds: list[tuple[Bound, float]], dtype: str
    ) -> Merged | None:
        """The sum as one LoRA, where every part has exact factors."""
        factors = []
        for part, (bound, weight) in zip(parts, bounds, strict=True):
            compute = part.module.detected.algorithm.factors
            if compute is None or part.module.detected.dora_slot is not None:
                return None
            low = compute(bound)
            if low is None:
                return None
            factors.append(low.scaled(weight))
        total = concat(factors)
        if any(part.module.detected.algorithm.name not in ("lora", "dylora") for part in parts):
            total = total.capped()
        shape = self._shape(place, parts)
        if total.core is not None:
            total = total if math.prod(shape[2:]) == total.core[0, 0].numel() else total.folded()
        slots = lora.from_factors(total, shape[2:], torch.float32)
        self._add_bias(slots, parts, bounds)
        label = "lora (cp)" if "lora_mid.weight" in slots else "lora"
        return self._saved(slots, dtype, parts, label)

    def _dense(
        self, place: tuple[str, str], parts: Sequence[Part], bounds: list[tuple[Bound, float]], dtype: str
    ) -> Merged:
        """The sum as a full difference."""
        shape = self._shape(place, parts)
        base = None
        if any(part.module.detected.needs_base for part in parts):
            base = self._base_weight(parts[0])
        total: Tensor | None = None
        for part, (bound, weight) in zip(parts, bounds, strict=True):
            change = weight_change(part.module.detected, bound, shape, base, strength=weight)
            total = change if total is None else total + change
        if total is None:
            raise ValueError("nothing to merge")
        slots = {"diff": total}
        self._add_bias(slots, parts, bounds)
        return self._saved(slots, dtype, parts, "full")

    def _add_bias(
        self, slots: dict[str, Tensor], parts: Sequence[Part], bounds: list[tuple[Bound, float]]
    ) -> None:
        for part, (bound, weight) in zip(parts, bounds, strict=True):
            change = bias_change(part.module.detected, bound, strength=weight)
            if change is not None:
                slots["diff_b"] = slots["diff_b"] + change if "diff_b" in slots else change

    def _saved(self, slots: Mapping[str, Tensor], dtype: str, parts: Sequence[Part], label: str) -> Merged:
        name = parts[0].module.name
        saved = {
            slot: self._cast(tensor, dtype if tensor.is_floating_point() else from_torch(tensor.dtype), name)
            for slot, tensor in slots.items()
            if slot != "alpha"
        }
        rank = None
        if "alpha" in slots:
            rank = int(slots["alpha"].item())
            saved["alpha"] = alpha_tensor(float(rank), saved)
        return Merged(saved, label, rank)

    def _cast(self, tensor: Tensor, stored: str, key: str) -> Tensor:
        dtype = saved_dtype(self._options.dtype, stored)
        saved = cast_checked(tensor, dtype, path="merged adapter", key=key)
        if saved.is_floating_point() and not saved.any() and tensor.any():
            self.warnings.append(f"{key}: underflow: every value rounds to 0 in {dtype}")
        return saved.to("cpu")

    def _layer(self, part: Part) -> Layer | None:
        if self._layers is None:
            return None
        try:
            return self._layers.find(part.module.name)
        except AmbiguousNameError as error:
            raise IncompatibleError(str(error), path=part.adapter.path, key=part.module.name) from None

    def _base_weight(self, part: Part) -> Tensor:
        layer = self._layer(part)
        if layer is None or self._base is None:
            where = self._base.path if self._base else "(none given)"
            raise IncompatibleError(
                f"matches no layer of the base {where}", path=part.adapter.path, key=part.module.name
            )
        param = layer.weight
        weight = self._base.tensor(param.key).to(self._device, torch.float32)
        return param.view(weight)

    def _shape(self, place: tuple[str, str], parts: Sequence[Part]) -> Shape:
        """The layer's weight shape: from the base, from a part that tells it, or by its name."""
        layer = self._layer(parts[0])
        if layer is not None:
            return layer.weight.shape
        for part in parts:
            sizes = part.module.detected.sizes
            if isinstance(rest := sizes.get("rest"), tuple) and isinstance(out := sizes["out"], int):
                return (out, *rest)
        rows, columns = (
            next((size for part in parts if (size := outline(part.module)[axis]) is not None), None)
            for axis in (0, 1)
        )
        if rows is None or columns is None:
            raise IncompatibleError(
                "the adapters do not tell the layer's shape", key=parts[0].module.name, hint="add `--base`"
            )
        kernel = kernel_of(place, [part.module for part in parts])
        if columns % math.prod(kernel):
            kernel = ()
        return (rows, columns // math.prod(kernel), *kernel)


def _keeps_form(part: Part) -> bool:
    """Whether a module alone at its place can be scaled without leaving its form."""
    if part.adapter.reading.loha_cp_shared_core and part.module.detected.layout.use_conv_cp:
        return False
    if part.weight == 1.0:
        return True
    return part.module.detected.dora_slot is None and bool(part.module.detected.layout.linear_in)


def _is_baseless(parts: Sequence[Part]) -> bool:
    """Whether the sum can be written down without the base weight."""
    if len(parts) == 1 and _keeps_form(parts[0]):
        return True
    if not any(part.module.detected.needs_base for part in parts):
        return True
    first = parts[0].module.detected
    if first.algorithm.concat is None or any(part.module.detected.dora_slot for part in parts):
        return False
    if any(part.module.detected.layout is not first.layout for part in parts):
        return False
    if first.algorithm.name == "ia3":
        return len({(_on_input(part), _elements(part)) for part in parts}) == 1
    ranks = [part.module.dims.rank or 0 for part in parts]
    width = first.sizes.get("in")
    return not isinstance(width, int) or sum(ranks) < width


def _on_input(part: Part) -> float:
    return part.adapter.store.scalar(part.module.keys["on_input"])


def _elements(part: Part) -> int:
    return part.adapter.store.info(part.module.keys["weight"]).numel
