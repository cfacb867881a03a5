"""What single modules change, read from an adapter in its smallest exact form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from lycotool.algorithms.base import MismatchError
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.errors import NumericError
from lycotool.lazy import torch
from lycotool.linalg.finite import extremes
from lycotool.linalg.low_rank import LowRank
from lycotool.models.layers import AmbiguousNameError, LayerIndex
from lycotool.ops._adapter import Adapter, AdapterModule
from lycotool.ops._render import outline

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.algorithms.base import Bound
    from lycotool.io.store import TensorStore

#: The form of a weight change: factors, two parts of a Kronecker product, or the matrix itself.
Form = Union[LowRank, tuple[LowRank, LowRank], "Tensor"]


class Unmeasured(Exception):  # noqa: N818 - no error: a reason that stands in a report
    """Why a module's change cannot be had."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one module changes, flattened to ``(out, in·kernel)``, at strength 1.

    Attributes
    ----------
    form
        None where only a bias changes.
    bias
        ``‖Δb‖``, 0 where there is none.
    base
        ``‖W‖_F`` of the layer, where a base was given and has it.
    largest
        The largest absolute value that is stored.
    """

    form: Form | None
    bias: float
    base: float | None
    largest: float


class ChangeReader:
    """Reads the changes of one adapter's modules.

    Parameters
    ----------
    base
        A checkpoint with the layers; needed by algorithms whose change depends on them.
    """

    def __init__(self, adapter: Adapter, device: torch.device, base: TensorStore | None) -> None:
        self._adapter = adapter
        self._device = device
        self._base = base
        self._layers = LayerIndex(base.shapes) if base is not None else None

    def read(self, module: AdapterModule) -> Change:
        """The module's change, in float32 (its own algebra is checked in float64 elsewhere).

        Raises
        ------
        NumericError
            If a stored value is NaN or infinite; the text counts them.
        Unmeasured
            If the change depends on a base weight that is not there.
        """
        bound = self._adapter.load(module, self._device, torch.float32, check=False)
        largest = self._largest(module, bound)
        weight = self._weight(module)
        norm = None if weight is None else float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        shift = bias_change(module.detected, bound, strength=1.0)
        bias = 0.0 if shift is None else float(torch.linalg.vector_norm(shift, dtype=torch.float64))
        try:
            form = self._form(module, bound, weight)
        except MismatchError as error:
            raise Unmeasured(str(error)) from None
        return Change(form, bias, norm, largest)

    def _largest(self, module: AdapterModule, bound: Bound) -> float:
        largest = 0.0
        for slot, tensor in bound.tensors.items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            low, high = extremes(tensor)
            if not (torch.finfo(tensor.dtype).min <= low <= high <= torch.finfo(tensor.dtype).max):
                count = int((~torch.isfinite(tensor)).sum())
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
                raise NumericError(
                    f"{count} of {tensor.numel()} values of {slot} are not finite ({kind})",
                    path=self._adapter.path,
                    key=module.keys[slot],
                )
            largest = max(largest, -low, high)
        return largest

    def _weight(self, module: AdapterModule) -> Tensor | None:
        """The layer's weight, if there is a base that has the layer."""
        if self._layers is None or self._base is None:
            return None
        try:
            layer = self._layers.find(module.name)
        except AmbiguousNameError as error:
            raise Unmeasured(str(error)) from None
        if layer is None:
            return None
        stored = self._base.tensor(layer.weight.key).to(self._device, torch.float32)
        return layer.weight.view(stored)

    def _form(self, module: AdapterModule, bound: Bound, weight: Tensor | None) -> Form | None:
        detected = module.detected
        if detected.needs_base:
            if weight is None:
                missing = "the base has no such layer" if self._base else "depends on the base weight"
                raise Unmeasured(missing)
            return weight_change(detected, bound, tuple(weight.shape), weight, strength=1.0).flatten(1)
        if weight is not None:
            detected.check_fits(tuple(weight.shape))
        algorithm = detected.algorithm
        if algorithm.kronecker_parts is not None:
            return algorithm.kronecker_parts(bound)
        if algorithm.factors is not None and (low := algorithm.factors(bound)) is not None:
            return low
        rows, columns = outline(module)
        if rows is None or columns is None:
            return None
        return weight_change(detected, bound, (rows, columns), None, strength=1.0)
