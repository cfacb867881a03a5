"""What several adapters make of one layer together; see :mod:`lycotool.ops.merge`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.algorithms import lora
from lycotool.algorithms.base import Bound, MismatchError, Shape
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.devices import resolve_device
from lycotool.errors import IncompatibleError
from lycotool.io.dtypes import from_torch
from lycotool.io.store import TensorStore
from lycotool.io.writer import TensorPlan
from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank, concat
from lycotool.linalg.underflow import Underflow
from lycotool.models.layers import AmbiguousNameError, Layer, LayerIndex
from lycotool.ops._common import WriteOptions, cast_checked, listed, refuse_warnings, saved_dtype
from lycotool.ops._merge_parts import Group, Part, is_baseless, keeps_form
from lycotool.ops._methods import Combination
from lycotool.ops._render import (
    alpha_tensor,
    common_dtype,
    kept_form,
    kernel_of,
    outline,
    without_alpha,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Slots that hold the change of a bias, beside those that change the weight.
_BIAS_SLOTS = frozenset({"diff_b", "b_norm", "lora_up.bias"})


@dataclass(frozen=True, slots=True)
class Merged:
    """A module of the result: what it will be, and how to get its slots in their saved dtypes."""

    plans: Mapping[str, TensorPlan]
    make: Callable[[], Mapping[str, Tensor]]
    label: str
    rank: int | None


class Merger:
    """Merges the modules of one layer after the other, on one device.

    Parameters
    ----------
    spelling
        The names of the result's slots; without ``kohya`` a LoRA has no alpha.
    in_one_form
        Whether modules are to become ΔW or its factors even where their own form would do.
    """

    def __init__(
        self,
        options: WriteOptions,
        base: TensorStore | None,
        combination: Combination,
        *,
        spelling: str,
        in_one_form: bool,
    ) -> None:
        self._options = options
        self._device = resolve_device(options.device)
        self._base = base
        self._layers = LayerIndex(base.shapes) if base is not None else None
        self._combination = combination
        self._spelling = spelling
        self._in_one_form = in_one_form
        self.underflow = Underflow()

    @property
    def is_dense(self) -> bool:
        """Whether the method needs the changes themselves."""
        return self._combination.is_dense

    def load(self, part: Part) -> Bound:
        """A part's tensors in float32 on the device."""
        return part.adapter.load(part.module, self._device, torch.float32)

    def check(self, groups: Sequence[Group]) -> None:
        """Find what cannot be merged before any tensor is read.

        Raises
        ------
        IncompatibleError
            Naming a module that does not fit the base, or listing modules of different sizes and
            modules that need a base.
        """
        faults: list[str] = []
        baseless: list[str] = []
        for group in groups:
            if (layer := self._layer(group)) is not None:
                for part in group.parts:
                    with _placed(part):
                        part.module.detected.check_fits(layer.weight.shape)
            for axis, name in enumerate(("rows", "columns")):
                found: dict[int, Part] = {}
                for part in group.parts:
                    if (size := outline(part.module)[axis]) is not None:
                        found.setdefault(size, part)
                if len(found) > 1:
                    text = " and ".join(f"{size} in {found[size].adapter.path}" for size in sorted(found))
                    faults.append(f"{group.name}: {name} differ: {text}")
            dependent = group.needs_base if self._in_one_form else not is_baseless(group.parts)
            if self._layers is None and dependent:
                baseless.append(group.name)
        if faults:
            raise IncompatibleError("the adapters are for different layers", details=listed(faults))
        if baseless:
            raise IncompatibleError(
                f"{len(baseless)} modules change the weight by an amount that depends on it",
                details=listed(baseless),
                hint="`--base CHECKPOINT` gives the weights, or `lycotool bake` folds each adapter",
            )

    def merge(self, group: Group) -> Merged:
        """The combined change as one module, in the form that stays smallest."""
        if self._combination.is_dense:
            return self._dense(group)
        if len(group.parts) == 1 and keeps_form(group.parts[0]) and not self._in_one_form:
            return self._kept(group)
        bounds = self._bounds(group)
        return self._closed(group, bounds) or self._low_rank(group, bounds) or self._dense(group)

    def dtype(self, group: Group) -> str:
        """What the module is saved in, by its name in safetensors."""
        return saved_dtype(
            self._options.dtype, common_dtype((part.adapter, part.module) for part in group.parts)
        )

    def change(self, group: Group) -> tuple[Tensor | None, Tensor | None]:
        """The combined change of the weight and of the bias, dense and in float32.

        None stands for a weight or bias that no adapter changes.
        """
        shape = self.shape(group)
        base = self._base_weight(group) if group.needs_base else None
        weights: dict[int, Tensor] = {}
        biases: dict[int, Tensor] = {}
        for part, (bound, weight) in zip(group.parts, self._bounds(group), strict=True):
            strength = self._combination.strength(weight)
            with _placed(part):
                if group.has_weight:
                    weights[part.index] = weight_change(
                        part.module.detected, bound, shape, base, strength=strength
                    )
                bias = bias_change(part.module.detected, bound, strength=strength)
            if bias is not None:
                biases[part.index] = bias
        return self._total(group, "weight", weights), self._total(group, "bias", biases)

    def factors(self, group: Group) -> LowRank | None:
        """The sum's exact factors, or None where a part has none or the method needs more."""
        return None if self._combination.is_dense else self._summed_factors(group, self._bounds(group))

    def bias(self, group: Group) -> Tensor | None:
        """The sum of the biases' changes."""
        return self._summed_biases(group, self._bounds(group))

    def has_bias(self, group: Group) -> bool:
        """Whether the change of a bias comes with it."""
        return any(_BIAS_SLOTS & part.module.keys.keys() for part in group.parts)

    def as_lora(self, group: Group, low: LowRank, bias: Tensor | None) -> Merged:
        """A module of these factors."""
        shape = self.shape(group)
        if low.core is not None and math.prod(shape[2:]) != low.core[0, 0].numel():
            low = low.folded()
        slots = lora.from_factors(low, shape[2:], torch.float32)
        if bias is not None:
            slots["diff_b"] = bias
        label = "lora (cp)" if "lora_mid.weight" in slots else "lora"
        return self._saved(group, slots, label)

    def as_stored(self, group: Group, factors: Mapping[str, Tensor], alpha: float) -> Merged:
        """A LoRA of factors that go with an alpha other than their rank."""
        merged = self._saved(group, factors, "lora")
        slots = {**merged.make(), "alpha": alpha_tensor(alpha, merged.make())}
        return self._planned(group, slots, "lora", factors["lora_down.weight"].shape[0])

    def base_weight(self, group: Group) -> Tensor | None:
        """The layer's weight in the base checkpoint, where there is one."""
        return None if self._layer(group) is None else self._base_weight(group)

    def shape(self, group: Group) -> Shape:
        """The layer's weight shape: from the base, from a part that tells it, or by its name."""
        layer = self._layer(group)
        if layer is not None:
            return layer.weight.shape
        for part in group.parts:
            sizes = part.module.detected.sizes
            if isinstance(rest := sizes.get("rest"), tuple) and isinstance(out := sizes["out"], int):
                return (out, *rest)
        rows, columns = (
            next((size for part in group.parts if (size := outline(part.module)[axis]) is not None), None)
            for axis in (0, 1)
        )
        if rows is not None and group.is_vector:
            return (rows,)
        if rows is None or columns is None:
            if rows is not None and not group.has_weight:
                return (rows, 1)
            raise IncompatibleError(
                "the adapters do not tell the layer's shape", key=group.name, hint="add `--base`"
            )
        kernel = kernel_of(group.place, [part.module for part in group.parts])
        if columns % math.prod(kernel):
            kernel = ()
        return (rows, columns // math.prod(kernel), *kernel)

    def _bounds(self, group: Group) -> list[tuple[Bound, float]]:
        return [(self.load(part), part.weight) for part in group.parts]

    def _kept(self, group: Group) -> Merged:
        """One adapter's module in its own form, its weight folded into one factor."""
        (part,) = group.parts
        self.load(part)  # refuses NaN and Inf
        slots = kept_form(part.adapter, part.module, weight=part.weight, save=self._cast)
        return self._planned(group, slots, part.module.detected.label, part.module.dims.rank)

    def _closed(self, group: Group, bounds: list[tuple[Bound, float]]) -> Merged | None:
        """The sum in the parts' own form, where the algorithm is closed under addition."""
        algorithm = group.parts[0].module.detected.algorithm
        if algorithm.concat is None or any(
            part.module.detected.algorithm is not algorithm or part.module.detected.dora_slot
            for part in group.parts
        ):
            return None
        slots = algorithm.concat(bounds)
        return None if slots is None else self._saved(group, slots, algorithm.name)

    def _low_rank(self, group: Group, bounds: list[tuple[Bound, float]]) -> Merged | None:
        """The sum as one LoRA, where every part has exact factors."""
        total = self._summed_factors(group, bounds)
        return None if total is None else self.as_lora(group, total, self._summed_biases(group, bounds))

    def _summed_factors(self, group: Group, bounds: Sequence[tuple[Bound, float]]) -> LowRank | None:
        factors = []
        for part, (bound, weight) in zip(group.parts, bounds, strict=True):
            compute = part.module.detected.algorithm.factors
            if compute is None or part.module.detected.dora_slot is not None:
                return None
            with _placed(part):
                low = compute(bound)
            if low is None:
                return None
            factors.append(low.scaled(weight))
        total = concat(factors)
        if any(part.module.detected.algorithm.name not in ("lora", "dylora") for part in group.parts):
            total = total.capped()
        return total

    def _summed_biases(self, group: Group, bounds: Sequence[tuple[Bound, float]]) -> Tensor | None:
        total: Tensor | None = None
        for part, (bound, weight) in zip(group.parts, bounds, strict=True):
            with _placed(part):
                change = bias_change(part.module.detected, bound, strength=weight)
            if change is not None:
                total = change if total is None else total + change
        return total

    def _dense(self, group: Group) -> Merged:
        """The combined change as a difference, computed when it is asked for."""
        weight, bias = ("w_norm", "b_norm") if group.is_vector else ("diff", "diff_b")
        shape, dtype = self.shape(group), self.dtype(group)
        plans = {weight: TensorPlan(dtype, shape)} if group.has_weight else {}
        if self.has_bias(group):
            plans[bias] = TensorPlan(dtype, (shape[0],))

        def make() -> dict[str, Tensor]:
            found = zip((weight, bias), self.change(group), strict=True)
            made = {slot: self._cast(x, dtype, f"{group.name}.{slot}") for slot, x in found if x is not None}
            refuse_warnings(self.underflow.warnings(), strict=self._options.strict)
            return made

        return Merged(plans, make, "norm" if group.is_vector else "full", None)

    def _total(self, group: Group, part: str, changes: Mapping[int, Tensor]) -> Tensor | None:
        if not changes:
            return None
        if self._combination.is_dense:
            return self._combination.combined(group.place, part, changes, group.weights)
        total, *others = changes.values()
        for change in others:
            total = total + change
        return total

    def _saved(self, group: Group, slots: Mapping[str, Tensor], label: str) -> Merged:
        dtype = self.dtype(group)
        saved = {
            slot: self._cast(
                tensor,
                dtype if tensor.is_floating_point() else from_torch(tensor.dtype),
                f"{group.name}.{slot}",
            )
            for slot, tensor in slots.items()
            if slot != "alpha"
        }
        rank = None
        if "alpha" in slots:
            rank = int(slots["alpha"].item())
            saved["alpha"] = alpha_tensor(float(rank), saved)
        return self._planned(group, saved, label, rank)

    def _planned(self, group: Group, slots: dict[str, Tensor], label: str, rank: int | None) -> Merged:
        if self._spelling != "kohya" and "lora_up.weight" in slots:
            slots = without_alpha(slots, group.name, self.underflow)
        plans = {slot: TensorPlan(from_torch(t.dtype), tuple(t.shape)) for slot, t in slots.items()}
        return Merged(plans, lambda: slots, label, rank)

    def _cast(self, tensor: Tensor, stored: str, key: str) -> Tensor:
        dtype = saved_dtype(self._options.dtype, stored)
        saved = cast_checked(tensor, dtype, path="merged adapter", key=key, underflow=self.underflow)
        return saved.to("cpu")

    def _layer(self, group: Group) -> Layer | None:
        if self._layers is None:
            return None
        try:
            return self._layers.find(group.name)
        except AmbiguousNameError as error:
            raise IncompatibleError(str(error), path=group.parts[0].adapter.path, key=group.name) from None

    def _base_weight(self, group: Group) -> Tensor:
        layer = self._layer(group)
        if layer is None or self._base is None:
            where = self._base.path if self._base else "(none given)"
            part = next((part for part in group.parts if part.module.detected.needs_base), group.parts[0])
            raise IncompatibleError(
                f"matches no layer of the base {where}", path=part.adapter.path, key=part.module.name
            )
        param = layer.weight
        return param.view(self._base.tensor(param.key).to(self._device, torch.float32))


@contextmanager
def _placed(part: Part) -> Iterator[None]:
    """Name the file and the module whose tensors turn out not to fit."""
    try:
        yield
    except MismatchError as error:
        raise IncompatibleError(str(error), path=part.adapter.path, key=part.module.name) from None
