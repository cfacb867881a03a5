"""`merge --verify`: ΔW of the file that was written against ``Σ w·ΔW`` of what was read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lycotool.algorithms.base import Reading
from lycotool.errors import CheckError
from lycotool.io.store import Entry, SafetensorsFile, TensorStore
from lycotool.io.writer import Written
from lycotool.lazy import torch
from lycotool.ops._adapter import Adapter, read_adapter
from lycotool.ops._common import Progress, listed
from lycotool.ops._convert_forms import Form, read_form
from lycotool.ops._merge_kohya import kohya_factors
from lycotool.ops._merge_options import MergeOptions
from lycotool.ops._merge_parts import Group
from lycotool.ops._merger import Merged, Merger
from lycotool.ops._truncate import Truncation
from lycotool.ops._verify import Comparison, compare_changes, compare_sums

if TYPE_CHECKING:
    from torch import Tensor

#: How many eps of the saved dtype a module may be off by, beside what truncation leaves out:
#: each factor is rounded once, and products of two to four of them add up. Sums in float32
#: over ranks and adapters add as many eps of float32 again.
_ROUNDING = 4.0


@dataclass(frozen=True, slots=True)
class MergeVerification:
    """What `--verify` found: ``‖ΔW_written - Σ w·ΔW‖ / ‖Σ w·ΔW‖`` over the modules.

    Truncation is part of it. Sums whose terms cancel are measured by the terms.
    """

    modules: int
    max_error: float
    mean_error: float


@dataclass
class MergeVerifier:
    """Compares a finished file with its inputs, before it has its name.

    Parameters
    ----------
    name_of
        Gives a layer's name in the file.
    """

    merger: Merger
    options: MergeOptions
    name_of: Callable[[Group], str]
    modules: Sequence[tuple[Group, Merged]]
    truncation: Truncation | None
    progress: Progress
    _errors: list[float] = field(default_factory=list)

    def check(self, written: Written) -> None:
        """Compare every module.

        Raises
        ------
        CheckError
            Naming the modules that differ by more than rounding and truncation make.
        """
        self.progress.start("verify", sum(group.nbytes for group, _ in self.modules))
        file = SafetensorsFile(written.path)
        try:
            store = TensorStore(
                "the written file", "file", {name: Entry(file, name) for name in file.tensors}, file.metadata
            )
            # What else can be read in two ways was written in a form that cannot.
            reading = Reading(glora_old_scale=self.options.reading.glora_old_scale)
            adapter = read_adapter(store, reading=reading)
            adapter.require_sound()
            faults = [
                fault for group, merged in self.modules if (fault := self._fault(adapter, group, merged))
            ]
        finally:
            file.close()
        if faults:
            raise CheckError(
                f"verification failed for {len(faults)} modules; nothing was written",
                details=listed(faults),
                hint="`--dtype fp32` keeps more digits",
            )

    def result(self) -> MergeVerification:
        """What was compared."""
        mean = sum(self._errors) / len(self._errors) if self._errors else 0.0
        return MergeVerification(len(self._errors), max(self._errors, default=0.0), mean)

    def _fault(self, adapter: Adapter, group: Group, merged: Merged) -> str | None:
        name = self.name_of(group)
        module = adapter.modules.get(name)
        if module is None:
            return f"{name}: is not in the written file"
        found = self._compared(group, read_form(adapter, module))
        self.progress.advance(group.nbytes)
        left = 0.0 if self.truncation is None else self.truncation.left.get(group.place, 0.0)
        eps = max((torch.finfo(dtype).eps for dtype in _dtypes(adapter, name)), default=0.0)
        allowed = _ROUNDING * (eps + torch.finfo(torch.float32).eps) * math.sqrt(found.terms)
        error = math.sqrt(found.lost)
        scale = math.sqrt(found.norm) if found.norm > allowed**2 else math.sqrt(found.terms)
        self._errors.append(error / scale if scale else (0.0 if error == 0 else math.inf))
        if error > allowed + math.sqrt(left) * (1 + 1e-3):
            return f"{name}: {self._errors[-1]:.3g} of the change is missing or wrong"
        return None

    def _compared(self, group: Group, written: Form) -> Comparison:
        if self.options.compat == "kohya":
            slots, alpha = kohya_factors(group, self.merger, concat=self.options.concat)
            up, down = (slots[f"lora_{side}.weight"].cpu().double().flatten(1) for side in ("up", "down"))
            return compare_changes(alpha / up.shape[1] * (up @ down), None, written, None)
        if self.merger.is_dense:
            weight, bias = self.merger.change(group)
            return compare_changes(weight, bias, written, self.merger.base_weight(group))
        terms = [(read_form(part.adapter, part.module), part.weight) for part in group.parts]
        return compare_sums(terms, written, self._base(group))

    def _base(self, group: Group) -> Tensor | None:
        """The layer's weight, or one of its shape where nothing depends on it."""
        known = self.merger.base_weight(group)
        if known is not None:
            return known.cpu()
        if group.needs_base or not group.has_weight:
            return None
        return torch.zeros(self.merger.shape(group), dtype=torch.float64)


def _dtypes(adapter: Adapter, name: str) -> list[torch.dtype]:
    return [
        dtype
        for slot, dtype in read_form(adapter, adapter.modules[name]).stored.items()
        if dtype.is_floating_point and slot != "alpha"
    ]
