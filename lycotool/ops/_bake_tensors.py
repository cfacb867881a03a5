"""The tensors `bake` writes, one at a time: copied, changed, requantised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lycotool.algorithms.base import MismatchError
from lycotool.algorithms.detection import bias_change, weight_change
from lycotool.errors import IncompatibleError
from lycotool.formats.quantisation import FLOAT8, Scaled
from lycotool.io.dtypes import to_torch
from lycotool.io.store import SafetensorsFile, Stored, TensorStore
from lycotool.io.writer import TensorPlan
from lycotool.lazy import torch
from lycotool.linalg.finite import extremes
from lycotool.linalg.quantised import Rounding, dequantise_, read_into, requantise_
from lycotool.linalg.underflow import Underflow
from lycotool.ops._bake_combined import CombinedEdits
from lycotool.ops._bake_plan import Edit
from lycotool.ops._common import as_bytes, cast_checked, check_range, refuse_warnings
from lycotool.ops._read_ahead import ReadAhead, Wanted

if TYPE_CHECKING:
    from torch import Tensor


#: Bytes of a tensor that are worth a system call of their own.
_COPIED_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """What is baked: the checkpoint as stored and as numbers, and the changes.

    Attributes
    ----------
    store
        What is copied where nothing changes; its float8 weights may have scales.
    numbers
        The same with float32 weights in place of scaled ones. The same store where no weight
        is scaled, or where all of them are written as something else.
    scaled
        The scaled weights that stay scaled.
    plans
        dtype and shape of every tensor to be written.
    combined
        How the changes of one layer become one; None is their sum.
    """

    store: TensorStore
    numbers: TensorStore
    scaled: Mapping[str, Scaled]
    edits: Mapping[str, Sequence[Edit]]
    plans: Mapping[str, TensorPlan]
    combined: CombinedEdits | None = None

    def is_copied(self, key: str) -> bool:
        """Whether a tensor is written as it is stored, byte for byte."""
        if key in self.edits or key in self.changed_scales:
            return False
        return self.plans[key].dtype == self.store.info(key).dtype

    @cached_property
    def changed_scales(self) -> dict[str, str]:
        """The scales that change with their weights: their keys to the weights'."""
        return {self.scaled[key].scale: key for key in self.edits if key in self.scaled}

    def as_stored(self, key: str) -> Stored | None:
        """A large tensor that the system can copy from file to file, because nobody here reads it."""
        file, name = self.store.entries[key]
        if not self.is_copied(key) or not isinstance(file, SafetensorsFile) or file.is_read:
            return None
        return Stored(file, name) if file.tensors[name].nbytes >= _COPIED_BYTES else None

    def in_turn(self, keys: Iterable[str], *, by_system: bool) -> Iterator[Wanted]:
        """What is read of the checkpoint when these tensors are written.

        Parameters
        ----------
        by_system
            Whether what :meth:`as_stored` gives is left to the system.
        """
        for key in keys:
            if by_system and self.as_stored(key) is not None:
                continue
            if self.is_copied(key):
                yield Wanted(self.store, key)
            elif key not in self.changed_scales:
                yield Wanted(self.numbers, key)

    def dtype_of(self, key: str) -> torch.dtype:
        """What a tensor is computed in: float32, and float64 where it is stored so."""
        return torch.float64 if self.numbers.info(key).dtype == "F64" else torch.float32

    def compute(
        self,
        key: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        base: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """``W + Σ s·ΔW`` of one checkpoint tensor, every ``ΔW`` on the original ``W``.

        Parameters
        ----------
        dtype
            To compute in; None is :meth:`dtype_of`. A merge method always computes in that: which
            elements are the largest must not depend on it.
        base
            ``W`` in the dtype it is computed in, where it has been read; the result may take its place.
        scratch
            Memory for the changes.
        """
        edits = self.edits.get(key, ())
        usual = self.dtype_of(key)
        if self.combined is not None and edits:
            if base is None:
                base = self.numbers.tensor(key).to(device, usual)
            total = self.combined.added(base, edits, _change)
            return total if dtype is None else total.to(dtype)
        if base is None:
            base = self.numbers.tensor(key).to(device, usual if dtype is None else dtype)
        keep_base = len(edits) > 1 and any(edit.module.detected.needs_base for edit in edits)
        total = base.clone() if keep_base else base
        for edit in edits:
            change = _change(edit, base, edit.strength, scratch)
            if change is not None:
                edit.param.view(total).add_(change)
        return total


def _change(edit: Edit, base: Tensor, strength: float, scratch: Scratch | None = None) -> Tensor | None:
    """One module's change of (its rows of) a weight or bias; in the scratch memory where that is given."""
    bound = edit.adapter.load(edit.module, base.device, base.dtype)
    if edit.part == "bias":
        return bias_change(edit.module.detected, bound, strength=strength)
    part = edit.param.view(base)
    if scratch is not None:
        bound = replace(bound, memory=scratch.empty((part.numel(),), base.dtype, base.device))
    try:
        return weight_change(edit.module.detected, bound, edit.param.shape, part, strength=strength)
    except MismatchError as error:
        raise IncompatibleError(str(error), path=edit.adapter.path, key=edit.module.name) from None


class Scratch:
    """The memory of one tensor after the other, because the system gives out none that is not zeroed.

    Zeroing the float32 copy of a layer takes as long as adding its change.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any content; what was in here before is gone."""
        size = math.prod(shape)
        memory = self._memory
        if memory is None or memory.dtype != dtype or memory.numel() < size:
            self._memory = memory = None  # first given back, then asked for anew
            self._memory = memory = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)


@dataclass
class Baker:
    """Produces the bytes of the tensors, and remembers what rounding did to them.

    Attributes
    ----------
    rounding
        Errors of the float8 weights that are not copied.
    reconstruction_error
        When unbaking, the most a changed weight can be off by, by the roundings of what was
        read and of what is written.
    scales
        New scales by key, until and after they are asked for: one number or row each.
    underflow
        What became zero, but in scaled weights: there what is small beside its block's largest
        value becomes zero, and ``n`` such values have less than ``√n · 2e-6`` of the norm.
    by_system
        Whether large copied tensors are only named, because whoever writes them hashes nothing.
    """

    source: Source
    device: torch.device
    is_unbaking: bool = False
    is_strict: bool = False
    rounding: Rounding = field(default_factory=Rounding)
    reconstruction_error: float = 0.0
    scales: dict[str, Tensor] = field(default_factory=dict)
    underflow: Underflow = field(default_factory=Underflow)
    by_system: bool = False
    _scratch: Scratch = field(default_factory=Scratch)
    _changes: Scratch = field(default_factory=Scratch)
    #: What is written of one tensor stays as it is while the next is rounded.
    _rounded: Iterator[Scratch] = field(default_factory=lambda: itertools.cycle((Scratch(), Scratch())))
    _ahead: ReadAhead | None = None

    @contextmanager
    def reading_ahead(self, keys: Iterable[str]) -> Iterator[None]:
        """Read the checkpoint on another thread while these tensors are asked for in this order."""
        wanted = self.source.in_turn(keys, by_system=self.by_system)
        self._ahead = ReadAhead(wanted, pinned=self.device.type == "cuda")
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def _pieces(self, store: TensorStore, key: str) -> Iterator[memoryview]:
        return store.chunks(key) if self._ahead is None else self._ahead.pieces(store, key)

    def _base(self, key: str, scratch: Scratch | None) -> Tensor:
        """A tensor in what it is computed in, in memory that is used again or of its own."""
        numbers = self.source.numbers
        info = numbers.info(key)
        memory = (scratch or Scratch()).empty(info.shape, self.source.dtype_of(key), self.device)
        place = 0
        for piece in self._pieces(numbers, key):
            part = torch.frombuffer(piece, dtype=to_torch(info.dtype)).to(self.device)
            read_into(memory.view(-1)[place : place + len(part)], part)
            place += len(part)
        return memory

    def produce(self, key: str) -> Iterable[memoryview | Stored]:
        """The bytes of one tensor as they are written.

        Raises
        ------
        NumericError
            If its dtype cannot hold a value.
        IncompatibleError
            If its dtype makes zero of more than rounding does, and that is to be an error.
        """
        source = self.source
        if self.by_system and (stored_bytes := source.as_stored(key)) is not None:
            return [stored_bytes]
        if source.is_copied(key):
            return self._pieces(source.store, key)
        if key in (weights := source.changed_scales):
            if key not in self.scales:  # in another file than its weight, and before it
                self._requantised(weights[key])
            return [as_bytes(self.scales[key])]
        if key in source.scaled:
            return [as_bytes(self._requantised(key))]
        dtype = source.plans[key].dtype
        is_rounded = dtype not in ("F32", "F64")  # else what is written is the result itself
        base = self._base(key, self._scratch if is_rounded else None)
        before = self._largest_before(key, base)
        exact = source.compute(key, self.device, base=base, scratch=self._changes)
        memory = None
        if is_rounded and self.device.type == "cpu":
            memory = next(self._rounded).empty(exact.shape, to_torch(dtype), self.device)
        saved = cast_checked(
            exact, dtype, path=source.store.path, key=key, underflow=self.underflow, memory=memory
        )
        refuse_warnings(self.underflow.warnings(), strict=self.is_strict)
        if dtype in FLOAT8:
            self.rounding.add(exact, read_into(torch.empty_like(exact), saved))
        self._count_reconstruction(key, before, saved.dtype, saved)
        return [as_bytes(saved)]

    def _requantised(self, key: str) -> Tensor:
        """A changed scaled weight as float8; its new scales are remembered."""
        source, scaled = self.source, self.source.scaled[key]
        base = self._base(key, self._scratch)
        before = self._largest_before(key, base)
        exact = source.compute(key, self.device, base=base, scratch=self._changes)
        if exact.numel():
            check_range(*extremes(exact), "F32", path=source.store.path, key=key)
        is_first = scaled.scale not in self.scales
        work = self._changes.empty(exact.shape, exact.dtype, exact.device)  # the changes are in `exact`
        stored, scale, beyond = requantise_(
            work.copy_(exact), scaled.grid, scaled.block, to_torch(source.plans[key].dtype),
            to_torch(source.plans[scaled.scale].dtype),
        )  # fmt: skip
        self.scales[scaled.scale] = scale.reshape(source.plans[scaled.scale].shape).cpu()
        if is_first:
            back = read_into(work, stored)
            dequantise_(back, scale.to(exact.dtype), scaled.block)
            self.rounding.add(exact, back)
            self.rounding.saturated += beyond
            self._count_reconstruction(key, before, stored.dtype, exact)
        return stored

    def _largest_before(self, key: str, base: Tensor) -> float:
        return _largest(base) if self.is_unbaking and key in self.source.edits else 0.0

    def _count_reconstruction(self, key: str, before: float, dtype: torch.dtype, values: Tensor) -> None:
        """Count the roundings of what was read, and of these values to the dtype they are stored in."""
        if not self.is_unbaking or key not in self.source.edits:
            return
        stored = to_torch(self.source.store.info(key).dtype)
        error = _rounding(stored, before)
        self.reconstruction_error = max(self.reconstruction_error, error + _rounding(dtype, _largest(values)))


def _largest(tensor: Tensor) -> float:
    return max(map(abs, extremes(tensor.float()))) if tensor.numel() else 0.0


def _rounding(dtype: torch.dtype, largest: float) -> float:
    """The most that rounding to a dtype can have moved an element of a tensor with this largest."""
    return torch.finfo(dtype).eps / 2 * largest
