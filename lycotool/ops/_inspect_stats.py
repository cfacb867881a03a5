"""How strong each module of an adapter is, and how many directions it uses; for `inspect --stats`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lycotool.errors import NumericError
from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank
from lycotool.linalg.measures import effective_rank, energy_rank, singular_values, stable_rank
from lycotool.models.naming import layer_kind
from lycotool.ops._adapter import Adapter
from lycotool.ops._batches import Batches
from lycotool.ops._changes import Change, ChangeReader, Unmeasured
from lycotool.ops._inspect_rows import blocks_of, component_of

if TYPE_CHECKING:
    from torch import Tensor

    from lycotool.io.store import TensorStore
    from lycotool.ops._common import Progress

#: Bytes of factors held back to be decomposed together.
_HELD_BYTES = 256 * 2**20

#: A module this much weaker than the median of its file changes nothing anybody could see.
DEAD_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class ModuleStats:
    """One module's change ``ΔW`` at strength 1, by its singular values.

    Attributes
    ----------
    block, layer
        Which block of the model it is in (``-`` outside of all, empty where that is not known),
        and what it does there; see :func:`lycotool.models.naming.layer_kind`.
    fro, spectral
        ``‖ΔW‖_F`` and ``‖ΔW‖₂``; with the other numbers None where the change cannot be had, and
        ``reason`` says why.
    rms
        ``‖ΔW‖_F / √numel``: comparable between layers of different sizes.
    bias
        ``‖Δb‖``.
    relative
        ``‖ΔW‖_F / ‖W‖_F``, where a base was given.
    stable_rank, effective_rank
        See :mod:`lycotool.linalg.measures`.
    energy_rank_90, energy_rank_95, energy_rank_99
        Fewest singular values with that share of ``‖ΔW‖_F²``.
    rank
        How many singular values the stored form can have.
    largest
        Largest absolute value stored.
    is_dead
        Whether it changes nothing: neither weight nor bias, or less than
        :data:`DEAD_SHARE` of the file's median ``‖ΔW‖_F``.
    is_finite
        Whether every stored value is.
    values
        The singular values, descending.
    """

    name: str
    type: str
    component: str
    block: str
    layer: str
    fro: float | None = None
    spectral: float | None = None
    rms: float | None = None
    bias: float = 0.0
    relative: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    energy_rank_90: int | None = None
    energy_rank_95: int | None = None
    energy_rank_99: int | None = None
    rank: int | None = None
    largest: float | None = None
    is_dead: bool = False
    is_finite: bool = True
    reason: str = ""
    values: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class StatsTotals:
    """All modules of a file, or of one component, together.

    ``fro`` is the root of the sum of the squares and ``spectral`` the largest ``‖ΔW‖₂``; ranks
    are means over the modules that change anything; ``relative`` is over those whose base is known.
    """

    modules: int
    measured: int
    fro: float
    spectral: float
    relative: float | None
    mean_stable_rank: float | None
    mean_effective_rank: float | None
    rank: int
    energy_rank_99: int
    dead: int
    non_finite: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What `inspect --stats` found: totals, totals by component, modules, reasons for gaps."""

    totals: StatsTotals
    components: dict[str, StatsTotals]
    modules: list[ModuleStats]
    unmeasured: dict[str, int]


def measure(adapter: Adapter, device: torch.device, base: TensorStore | None, progress: Progress) -> Stats:
    """Measure every module.

    LoRA, LoHa and LoKr from their factors; dense forms from the smaller Gram matrix; modules
    of equal sizes together.
    """
    reader = ChangeReader(adapter, device, base)
    found: dict[str, ModuleStats] = {}
    blocks = blocks_of(adapter)
    held = Batches[tuple[ModuleStats, Change]](
        lambda group: found.update(_measured(group)), limit=_HELD_BYTES
    )
    progress.start("measure", adapter.store.nbytes)
    for module in adapter.modules.values():
        name = module.name
        blank = ModuleStats(
            name, module.detected.label, component_of(name), blocks.get(name, ""), layer_kind(name)
        )
        try:
            change = reader.read(module)
        except NumericError as error:
            found[module.name] = replace(blank, is_finite=False, reason=error.message)
        except Unmeasured as gap:
            found[module.name] = replace(blank, reason=str(gap))
        else:
            held.add(_kind(change), (blank, change), _nbytes(change))
        progress.advance(sum(adapter.store.info(key).nbytes for key in module.keys.values()))
    held.finish()
    modules = _with_dead([found[name] for name in adapter.modules])
    components: dict[str, list[ModuleStats]] = {}
    unmeasured: dict[str, int] = {}
    for stats in modules:
        components.setdefault(stats.component, []).append(stats)
        if stats.reason and stats.is_finite:
            unmeasured[stats.reason] = unmeasured.get(stats.reason, 0) + 1
    return Stats(
        _totals(modules), {name: _totals(part) for name, part in components.items()}, modules, unmeasured
    )


def _matrices(change: Change) -> Sequence[LowRank | Tensor]:
    """The matrices whose singular values make those of the change."""
    if change.form is None:
        return ()
    return change.form if isinstance(change.form, tuple) else (change.form,)


def _kind(change: Change) -> tuple[tuple[int, ...], ...]:
    """Equal for changes that are decomposed in one batch."""
    return tuple(
        (matrix.rank,) if isinstance(matrix, LowRank) else tuple(matrix.shape) for matrix in _matrices(change)
    )


def _nbytes(change: Change) -> int:
    return sum(
        sum(part.nbytes for part in (m.up, m.down, m.core) if part is not None)
        if isinstance(m, LowRank)
        else m.nbytes
        for m in _matrices(change)
    )


def _measured(group: Sequence[tuple[ModuleStats, Change]]) -> Iterable[tuple[str, ModuleStats]]:
    """Modules with their numbers filled in."""
    try:
        spectra = iter(singular_values([matrix for _, change in group for matrix in _matrices(change)]))
    except NumericError as error:
        if len(group) == 1:
            yield group[0][0].name, replace(group[0][0], is_finite=False, reason=error.message)
            return
        for one in group:
            yield from _measured([one])
        return
    for blank, change in group:
        parts = [next(spectra) for _ in _matrices(change)]
        yield blank.name, _filled(blank, change, parts)


def _filled(blank: ModuleStats, change: Change, parts: Sequence[Tensor]) -> ModuleStats:
    shape = _shape(change)
    values = torch.zeros(0, dtype=torch.float64)
    if len(parts) == 2:  # σ(A ⊗ B) are all products
        values = (parts[0][:, None] * parts[1][None, :]).flatten().sort(descending=True).values
    elif parts:
        values = parts[0]
    values = values[: min(shape)]
    fro = float(torch.linalg.vector_norm(values))
    return replace(
        blank,
        fro=fro,
        spectral=float(values[0]) if len(values) else 0.0,
        rms=fro / math.sqrt(math.prod(shape)) if math.prod(shape) else 0.0,
        bias=change.bias,
        relative=fro / change.base if change.base else None,
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        energy_rank_90=energy_rank(values, 0.9),
        energy_rank_95=energy_rank(values, 0.95),
        energy_rank_99=energy_rank(values, 0.99),
        rank=len(values),
        largest=change.largest,
        values=tuple(values.tolist()),
    )


def _shape(change: Change) -> tuple[int, int]:
    """Rows and columns of the flattened weight."""
    rows = columns = 1
    for matrix in _matrices(change):
        m, n = matrix.shape
        rows, columns = rows * m, columns * n
    return (0, 0) if change.form is None else (rows, columns)


def _with_dead(modules: Sequence[ModuleStats]) -> list[ModuleStats]:
    strengths = [m.fro for m in modules if m.fro]
    least = DEAD_SHARE * statistics.median(strengths) if strengths else 0.0
    return [replace(m, is_dead=m.fro is not None and m.fro <= least and m.bias == 0) for m in modules]


def _totals(modules: Sequence[ModuleStats]) -> StatsTotals:
    measured = [m for m in modules if m.fro is not None]
    alive = [m for m in measured if m.fro]
    based = [m for m in measured if m.relative]
    square = math.fsum((m.fro or 0.0) ** 2 for m in measured)
    relative = None
    if based:
        weights = math.fsum(((m.fro or 0.0) / (m.relative or 1.0)) ** 2 for m in based)
        relative = math.sqrt(math.fsum((m.fro or 0.0) ** 2 for m in based) / weights)
    return StatsTotals(
        modules=len(modules),
        measured=len(measured),
        fro=math.sqrt(square),
        spectral=max((m.spectral or 0.0 for m in measured), default=0.0),
        relative=relative,
        mean_stable_rank=_mean(m.stable_rank for m in alive),
        mean_effective_rank=_mean(m.effective_rank for m in alive),
        rank=sum(m.rank or 0 for m in measured),
        energy_rank_99=sum(m.energy_rank_99 or 0 for m in measured),
        dead=sum(m.is_dead for m in modules),
        non_finite=sum(not m.is_finite for m in modules),
    )


def _mean(numbers: Iterable[float | None]) -> float | None:
    found = [number for number in numbers if number is not None]
    return statistics.fmean(found) if found else None
