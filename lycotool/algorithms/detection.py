"""Recognise a module from names and shapes, and compute its change.

:func:`weight_change` and :func:`bias_change` are how every command evaluates a module; they
put DoRA over the algorithm's own formula where the module has a magnitude. So do
:func:`take_rows` and :func:`stack_rows` with the algorithm's own way to cut and join rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from lycotool.algorithms import ALGORITHMS, BY_METADATA, dora
from lycotool.algorithms.base import Algorithm, Bound, Header, Layout, MismatchError, Rule, Shape, Sizes
from lycotool.algorithms.lora import LORA
from lycotool.algorithms.rows import rows_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Detected:
    """What a module's names and shapes say it is."""

    algorithm: Algorithm
    layout: Layout
    sizes: Sizes = field(repr=False)
    dora_slot: str | None = None
    dora_axis: dora.Axis | None = None

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the base weight."""
        return self.algorithm.needs_base or self.dora_slot is not None

    @property
    def merge_rule(self) -> Rule:
        """The registry's verdict for `merge`."""
        if self.dora_slot is not None:
            return dora.MERGE_RULE
        if self.layout.use_conv_cp and self.algorithm.merge_conv_cp is not None:
            return self.algorithm.merge_conv_cp
        return self.algorithm.merge

    @property
    def resize_rule(self) -> Rule:
        """The registry's verdict for `resize`."""
        if self.dora_slot is not None:
            return dora.RESIZE_RULE
        if self.layout.use_conv_cp and self.algorithm.resize_conv_cp is not None:
            return self.algorithm.resize_conv_cp
        return self.algorithm.resize

    def check_fits(self, shape: Shape) -> None:
        """Compare what the sizes imply with a weight's shape, both flattened.

        Raises
        ------
        MismatchError
            With both sizes.
        """
        rows, columns = self.layout.rows(self.sizes), self.layout.columns(self.sizes)
        found = (shape[0] if shape else 1, math.prod(shape[1:]))
        if rows not in (None, found[0]) or columns not in (None, found[1]):
            made_for = f"{'any' if rows is None else rows}x{'any' if columns is None else columns}"
            raise MismatchError(
                f"is made for a {made_for} weight, this one is {found[0]}x{found[1]} (shape {list(shape)})"
            )

    @property
    def label(self) -> str:
        """``lora``, ``loha (cp)``, ``lokr + dora (in)``: how reports name it."""
        cp = " (cp)" if self.layout.use_conv_cp else ""
        return f"{self.algorithm.name}{cp}" + (f" + dora ({self.dora_axis})" if self.dora_axis else "")


def detect(header: Header, *, algorithm_hint: str | None = None) -> Detected:
    """Find the one layout that a module's names and shapes fit.

    Parameters
    ----------
    header
        Slot name to shape.
    algorithm_hint
        What the file's metadata says, for algorithms whose keys are those of another.

    Raises
    ------
    MismatchError
        If no layout fits, naming the tensor, what was found and what was expected, or if
        two do.
    """
    return _detect(tuple(header.items()), algorithm_hint)


@lru_cache(maxsize=4096)
def _detect(slots: tuple[tuple[str, Shape], ...], algorithm_hint: str | None) -> Detected:
    """:func:`detect`, remembered: the hundreds of modules of a file have a few dozen forms."""
    header = dict(slots)
    magnitudes = [slot.name for slot in dora.SLOTS if slot.name in header]
    if len(magnitudes) > 1:
        raise MismatchError("has both " + " and ".join(magnitudes))
    inner = {name: shape for name, shape in header.items() if name not in magnitudes}
    algorithm, layout, sizes = _detect_plain(inner, algorithm_hint)
    if not magnitudes:
        return Detected(algorithm, layout, sizes)
    if not algorithm.allows_dora:
        raise MismatchError(f"{magnitudes[0]} beside {algorithm.name}, which has no DoRA form")
    axis = dora.axis_of(magnitudes[0], header[magnitudes[0]])
    return Detected(algorithm, layout, sizes, magnitudes[0], axis)


def _detect_plain(header: Header, hint: str | None) -> tuple[Algorithm, Layout, Sizes]:
    candidates = _claiming(frozenset(header))
    if not candidates:
        raise MismatchError(_nearest(header))
    fits: list[tuple[Algorithm, Layout, Sizes]] = []
    faults: list[str] = []
    for algorithm, layout in candidates:
        try:
            fits.append((algorithm, layout, layout.bind(header)))
        except MismatchError as error:
            faults.append(str(error))
    if len(fits) > 1:
        fits = [fit for fit in fits if fit[1].prefers is None or fit[1].prefers(fit[2])] or fits
    if len(fits) > 1:
        names = " and ".join(f"{a.name} ({layout.name})" for a, layout, _ in fits)
        raise MismatchError(f"fits both {names}")
    if not fits:
        raise MismatchError("; ".join(dict.fromkeys(faults)))
    algorithm, layout, sizes = fits[0]
    if algorithm is LORA and hint in BY_METADATA and layout in BY_METADATA[hint].layouts:
        algorithm = BY_METADATA[hint]
    return algorithm, layout, sizes


@lru_cache(maxsize=256)
def _claiming(names: frozenset[str]) -> tuple[tuple[Algorithm, Layout], ...]:
    """The layouts that tensors of these names may be."""
    header: Header = dict.fromkeys(names, ())
    return tuple(
        (algorithm, layout)
        for algorithm in ALGORITHMS
        if algorithm.name not in BY_METADATA
        for layout in algorithm.layouts
        if layout.claims(header)
    )


def _nearest(header: Header) -> str:
    """Say what is missing from, or foreign to, the layout that shares most names."""
    everything = [(a, layout) for a in ALGORITHMS for layout in a.layouts]
    algorithm, layout = max(
        everything,
        key=lambda entry: (
            -len(entry[1].required - header.keys()) - len(header.keys() - entry[1].names),
            len(entry[1].required & header.keys()),
        ),
    )
    missing = sorted(layout.required - header.keys())
    foreign = sorted(header.keys() - layout.names)
    wanted = f"{algorithm.name} ({layout.name})"
    if missing:
        return f"{', '.join(missing)} missing: found {', '.join(sorted(header))}, expected {wanted}"
    return f"{', '.join(foreign)} does not belong to {wanted}"


def weight_change(
    detected: Detected,
    module: Bound,
    shape: Shape,
    base: Tensor | None,
    *,
    strength: float,
    rows: Tensor | None = None,
) -> Tensor:
    """The change of a layer's weight at ``strength``: ``W' - W``.

    Parameters
    ----------
    module
        The tensors, in the dtype and on the device to compute in.
    shape
        The weight's shape.
    base
        The weight itself; may be None unless ``detected.needs_base``.
    rows
        A factor for each output row of the algorithm's own change, below DoRA: what training
        drops.

    Raises
    ------
    MismatchError
        If the tensors do not fit ``shape``.
    """
    detected.check_fits(shape)
    inner = detected.algorithm.delta(module, shape, base)
    if rows is not None:
        inner = inner * rows.to(inner.dtype).reshape(-1, *[1] * (inner.ndim - 1))
    if detected.dora_slot is None or detected.dora_axis is None:
        if strength == 1.0:
            return inner
        return inner * strength if module.memory is None else inner.mul_(strength)
    if base is None:
        raise ValueError("DoRA needs the base weight")
    return dora.delta(
        module[detected.dora_slot],
        detected.dora_axis,
        inner,
        base,
        strength=strength,
        convention=module.reading.dora_strength,
    )


def bias_change(detected: Detected, module: Bound, *, strength: float) -> Tensor | None:
    """The change of a layer's bias at ``strength``, or None where the module has none."""
    if detected.algorithm.bias_delta is None:
        return None
    change = detected.algorithm.bias_delta(module)
    return None if change is None else strength * change


def take_rows(detected: Detected, module: Bound, index: Tensor) -> dict[str, Tensor] | None:
    """The module that changes these output rows of the layer as ``module`` does.

    Parameters
    ----------
    index
        Numbers of rows (int64, none twice), in the order they shall have.

    Returns
    -------
    dict of str to Tensor, or None
        What :attr:`Algorithm.take_rows` returns, with the magnitude of those rows.
    """
    if detected.algorithm.take_rows is None:
        return None
    taken = detected.algorithm.take_rows(module, index)
    if taken is None or detected.dora_slot is None or detected.dora_axis is None:
        return taken
    slot, axis = detected.dora_slot, detected.dora_axis
    magnitude = dora.take_rows(slot, module[slot], axis, index, rows_of(module))
    return None if magnitude is None else {**taken, slot: magnitude}


def stack_rows(parts: Sequence[tuple[Detected, Bound] | int]) -> tuple[dict[str, Tensor], float] | None:
    """The module that changes the rows of these layers below each other as their modules do.

    Parameters
    ----------
    parts
        Modules; an int is a layer of so many rows that does not change.

    Returns
    -------
    tuple of dict and float, or None
        What :attr:`Algorithm.stack_rows` returns, with the magnitudes. None too for modules of
        different algorithms; for DoRA beside rows whose magnitude only the base tells, and
        for DoRA with norms that run over all rows.
    """
    found = [part for part in parts if not isinstance(part, int)]
    first = found[0][0]
    algorithm, slot, axis = first.algorithm, first.dora_slot, first.dora_axis
    if algorithm.stack_rows is None or any(
        detected.algorithm is not algorithm or (detected.dora_slot, detected.dora_axis) != (slot, axis)
        for detected, _ in found
    ):
        return None
    stacked = algorithm.stack_rows([part if isinstance(part, int) else part[1] for part in parts])
    if stacked is None or slot is None:
        return stacked
    if axis == "in" or len(found) < len(parts):
        return None
    slots, scale = stacked
    return {**slots, slot: dora.stack_rows([module[slot] for _, module in found])}, scale
