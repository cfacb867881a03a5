"""Random modules of any registered algorithm, made from the symbolic axes of its layouts.

A newly registered algorithm gets its cases from here without a line of its own: symbols get
distinct small sizes, tensors get normal values. The few slots that hold no weights are
filled by name (:func:`_special`). :func:`_weight_shape` takes the layer's shape from the
meaning of the words, so that :attr:`Layout.rows` and :attr:`Layout.columns` are checked
against something other than themselves.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations

import torch

from lycotool.algorithms import ALGORITHMS, BY_METADATA
from lycotool.algorithms.base import (
    DEFAULT_READING,
    Algorithm,
    Bound,
    Header,
    Layout,
    Reading,
    Shape,
    Sizes,
    Slot,
)
from lycotool.algorithms.detection import Detected, detect
from lycotool.algorithms.dora import DORA_SCALE

KERNELS: tuple[Shape, ...] = ((), (1, 1), (3, 3), (3,), (3, 3, 3))

#: The layer's size along an axis of which the tensors tell nothing.
_FREE_ROWS, _FREE_COLUMNS = 7, 9


@dataclass(frozen=True)
class Case:
    """One stored form: what a file's module may look like."""

    algorithm: Algorithm
    layout: Layout
    kernel: Shape = ()
    optional: bool = True
    dora_axis: str | None = None
    on_input: int = 0

    @property
    def hint(self) -> str | None:
        """What the file's metadata must say for the algorithm to be known."""
        return self.algorithm.name if self.algorithm.name in BY_METADATA else None

    def __str__(self) -> str:
        parts = [self.algorithm.name, self.layout.name.replace(", ", "+").replace(" ", "_")]
        parts += ["x".join(map(str, self.kernel))] if self.kernel else []
        parts += [] if self.optional else ["required_only"]
        parts += [f"dora_{self.dora_axis}"] if self.dora_axis else []
        parts += ["on_input"] if self.on_input else []
        return "-".join(parts)


@dataclass(frozen=True)
class Module:
    """A case with sizes and tensors; the values are exact in float32."""

    case: Case
    sizes: Sizes
    shape: Shape
    tensors: Mapping[str, torch.Tensor]

    @property
    def header(self) -> dict[str, Shape]:
        """Slot name to shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @cached_property
    def detected(self) -> Detected:
        """The registry's answer."""
        return detect(self.header, algorithm_hint=self.case.hint)

    @cached_property
    def base(self) -> torch.Tensor:
        """A weight the module fits, in float64."""
        return normal(f"{self.case}/base", self.shape)

    def bound(self, dtype: torch.dtype = torch.float64, reading: Reading = DEFAULT_READING) -> Bound:
        """The tensors as every command hands them to a formula."""
        layout = self.case.layout
        unused = {slot.name for slot in layout.slots if slot.unused}
        alpha = float(self.tensors["alpha"]) if "alpha" in self.tensors else None
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
            if name != "alpha" and name not in unused
        }
        dims = self.case.algorithm.dims(layout, self.sizes, alpha, reading)
        return Bound(tensors, layout, self.sizes, dims, reading)

    def with_tensors(self, changes: Mapping[str, torch.Tensor]) -> Module:
        """The same module with some tensors replaced."""
        return replace(self, tensors={**self.tensors, **changes})

    def without(self, slot: str) -> Module:
        """The same module with one tensor less."""
        return replace(self, tensors={n: t for n, t in self.tensors.items() if n != slot})


def normal(name: str, shape: Shape) -> torch.Tensor:
    """Normal values that depend on the arguments alone, rounded to float32, in float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{shape}".encode()))
    return torch.randn(shape, generator=generator).double()


def cases() -> list[Case]:
    """Every layout of every algorithm, with every kernel it can have."""
    found: list[Case] = []
    for algorithm in ALGORITHMS:
        for layout in algorithm.layouts:
            plain = [Case(algorithm, layout, kernel) for kernel in kernels_of(layout)]
            plain.append(Case(algorithm, layout, plain[0].kernel, optional=False))
            if "on_input" in layout.names:
                plain += [replace(case, on_input=1) for case in plain]
            if algorithm.allows_dora:
                plain += [
                    replace(case, dora_axis=axis)
                    for case in plain
                    if case.kernel in ((), (3, 3)) and case.optional and not case.on_input
                    for axis in ("out", "in")
                ]
            found += plain
    return found


def kernels_of(layout: Layout) -> tuple[Shape, ...]:
    """The kernels a layout can express; a core is there for the sake of one."""
    if layout.use_conv_cp:
        return KERNELS[1:]
    words = {word for slot in layout.slots if not slot.unused for word in slot.axes.split()}
    any_kernel = any(word.endswith("_kernel") or (word.startswith("*") and word != "*1") for word in words)
    if any_kernel or (layout.columns(_sizes(layout, ())) is None):
        return KERNELS
    return ((), (1, 1)) if "*1" in words else ((),)


def make(case: Case, *, rank_shift: int = 0, seed: int = 0) -> Module:
    """Build one module.

    Parameters
    ----------
    rank_shift
        Added to the size of every symbol that begins with ``rank``.
    """
    sizes = _sizes(case.layout, case.kernel, rank_shift)
    shape = _weight_shape(case.layout, sizes, case.kernel)
    tensors: dict[str, torch.Tensor] = {}
    for slot in case.layout.slots:
        if slot.required or case.optional:
            name = f"{case.algorithm.name}/{slot.name}/{seed}"
            special = _special(slot, case, sizes, shape)
            tensors[slot.name] = (
                normal(name, _slot_shape(slot, case, sizes, shape)) if special is None else special
            )
    if case.dora_axis is not None:
        kept = 0 if case.dora_axis == "out" else 1
        size = [1] * len(shape)
        size[kept] = shape[kept]
        tensors[DORA_SCALE.name] = normal(f"dora/{seed}", tuple(size)).abs() + 0.5
    return Module(case, _bound_sizes(case.layout, tensors), shape, tensors)


def _bound_sizes(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Sizes:
    return layout.bind({n: tuple(t.shape) for n, t in tensors.items() if n in layout.names})


def _sizes(layout: Layout, kernel: Shape, rank_shift: int = 0) -> dict[str, int | Shape]:
    """A distinct size for every word: ranks 2, 3, 4, others from 5 up.

    Where the layout accepts only some combinations, the first of distinct sizes that it does.
    """
    words = dict.fromkeys(
        word
        for slot in layout.slots
        for word in slot.axes.split()
        if "*" not in word and not word.isdigit() and word != "scalar"
    )
    ranks = iter(range(2 + rank_shift, 9))
    others = iter(range(5, 30))
    sizes: dict[str, int | Shape] = {
        word: next(ranks if word.startswith("rank") else others) for word in words
    }
    for word in words:
        if word.endswith("_kernel"):
            sizes[word] = int(sizes[word]) * math.prod(kernel)
    sizes["kernel"] = kernel
    candidates = permutations(range(2, 9), len(words))
    while layout.accepts is not None and not layout.accepts[0](sizes):
        sizes.update(zip(words, next(candidates), strict=True))
    return sizes


def _weight_shape(layout: Layout, sizes: Sizes, kernel: Shape) -> Shape:
    """The layer's weight shape, from what the words mean."""
    if "channels" in sizes:
        return (_number(sizes, "channels"),)
    rows = [_number(sizes, word) for word in ("out", "out1", "out2", "blocks", "block") if word in sizes]
    columns = [_number(sizes, word) for word in ("in", "in1", "in2") if word in sizes]
    if "in_kernel" in sizes:
        columns = [_number(sizes, "in_kernel") // math.prod(kernel)]
    return (
        math.prod(rows) if rows else _FREE_ROWS,
        math.prod(columns) if columns else _FREE_COLUMNS,
        *kernel,
    )


def _number(sizes: Sizes, word: str) -> int:
    size = sizes[word]
    if not isinstance(size, int):
        raise TypeError(word)
    return size


def _slot_shape(slot: Slot, case: Case, sizes: Sizes, shape: Shape) -> Shape:
    if slot.axes == "scalar":
        return ()
    found: list[int] = []
    for word in slot.axes.split():
        if word == "*1":
            found += [1] * len(case.kernel)
        elif word == "*kernel":
            found += case.kernel
        elif word == "*vector":  # along one axis of the weight
            ones = [1] * len(case.kernel)
            found += [1, shape[1], *ones] if case.on_input and ones else [shape[case.on_input], *ones]
        elif word.startswith("*"):  # the rest of a weight
            found += shape[1:]
        elif word == "bias":  # as long as the layer has rows
            found.append(shape[0])
        elif word.isdigit():
            found.append(int(word))
        else:
            found.append(math.prod(_number(sizes, factor) for factor in word.split("*")))
    return tuple(found)


def _special(slot: Slot, case: Case, sizes: Sizes, shape: Shape) -> torch.Tensor | None:
    """Slots that hold switches, counts or scales rather than weights."""
    if slot.name == "alpha":
        return torch.tensor(1.5, dtype=torch.float64)
    if slot.name == "on_input":
        return torch.tensor(case.on_input)
    rows, columns = shape[0], math.prod(shape[1:])
    if slot.name == "bias_size":
        return torch.tensor([rows, columns], dtype=torch.int16)
    if slot.name == "bias_indices":
        count = _number(sizes, "nonzero")
        where = [[i * 3 % rows for i in range(count)], [i * 5 % columns for i in range(count)]]
        return torch.tensor(where, dtype=torch.int16)
    return None


def claimed(header: Header) -> bool:
    """Whether these tensor names are those of some layout."""
    return any(layout.claims(header) for algorithm in ALGORITHMS for layout in algorithm.layouts)


def tied_sizes(module: Module) -> Iterator[tuple[str, int]]:
    """Slot and axis of every size that something else in the module fixes too."""
    layout = module.case.layout
    slots = [s for s in layout.slots if s.name in module.tensors and s.axes != "scalar"]
    words = Counter(word for slot in slots for word in slot.axes.split())
    for slot in slots:
        for axis, word in enumerate(slot.axes.split()):
            if not word.startswith("*") and (word.isdigit() or "*" in word or words[word] > 1):
                yield slot.name, axis
