"""Two adapters layer by layer: how alike their changes are; for `inspect --compare`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lycotool.errors import IncompatibleError, NumericError
from lycotool.lazy import torch
from lycotool.linalg.low_rank import LowRank, kron
from lycotool.linalg.measures import as_factors, likeness
from lycotool.models.naming import layer_kind
from lycotool.ops._adapter import Adapter
from lycotool.ops._changes import Change, ChangeReader, Unmeasured
from lycotool.ops._inspect_rows import blocks_of, component_of
from lycotool.ops._naming import places

if TYPE_CHECKING:
    from lycotool.io.store import TensorStore
    from lycotool.ops._common import Progress

#: Rows and columns of a layer at whose crossings signs are compared.
_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class PairRow:
    """One layer that two adapters A and B change by ``ΔA`` and ``ΔB``, both at strength 1.

    Attributes
    ----------
    cosine
        ``⟨ΔA, ΔB⟩ / (‖ΔA‖ ‖ΔB‖)``; this and the next None where one is zero or not to be had, and
        ``reason`` says why.
    overlap_out, overlap_in
        Mean ``cos²`` of the principal angles between what 90 % of their energy writes to and reads
        from; see :func:`lycotool.linalg.measures.likeness`.
    norm, other_norm
        ``‖ΔA‖_F`` and ``‖ΔB‖_F``.
    norm_ratio
        ``‖ΔB‖_F / ‖ΔA‖_F``.
    interference
        ``2⟨ΔA, ΔB⟩ / (‖ΔA‖² + ‖ΔB‖²)``, what adding both does to the energy beyond the sum of the two:
        -1 where they cancel, 0 where they do not meet, 1 where they are the same.
    sign_conflict
        Share of elements, of those at the crossings of 64 rows and 64 columns drawn with a
        fixed seed, at which they have opposite signs: what TIES resolves.
    """

    name: str
    other_name: str
    component: str
    block: str
    layer: str
    type: str
    other_type: str
    cosine: float | None = None
    norm: float | None = None
    other_norm: float | None = None
    norm_ratio: float | None = None
    overlap_out: float | None = None
    overlap_in: float | None = None
    interference: float | None = None
    sign_conflict: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters side by side.

    ``cosine``, ``norm_ratio`` and ``interference`` are those of all compared layers put into one
    vector; the overlaps and the sign conflict are means weighted by ``‖ΔA‖ ‖ΔB‖``. ``layers`` are
    in the first adapter's order. Means are None where nothing could be compared.
    """

    path: str
    other: str
    compared: int
    cosine: float | None
    norm_ratio: float | None
    overlap_out: float | None
    overlap_in: float | None
    interference: float | None
    sign_conflict: float | None
    layers: list[PairRow]
    only_first: list[str]
    only_second: list[str]
    not_compared: dict[str, int]


def compare(
    first: Adapter, second: Adapter, device: torch.device, base: TensorStore | None, progress: Progress
) -> Comparison:
    """Compare the changes of two adapters, layers matched as `merge` matches them.

    Raises
    ------
    IncompatibleError
        If they change no layer in common.
    """
    ours, theirs = _by_place([first, second])
    shared = [place for place in ours if place in theirs]
    if not shared:
        raise IncompatibleError(
            f"changes no layer that {second.path} changes",
            path=first.path,
            details=[f"{first.path}: {next(iter(first.modules), 'no modules')}",
                     f"{second.path}: {next(iter(second.modules), 'no modules')}"],
            hint="are both for the same model? `lycotool convert` brings them into one naming",
        )  # fmt: skip
    readers = [ChangeReader(adapter, device, base) for adapter in (first, second)]
    progress.start("compare", sum(_nbytes(first, ours[p]) + _nbytes(second, theirs[p]) for p in shared))
    blocks = blocks_of(first)
    rows = []
    for place in shared:
        name = ours[place]
        rows.append(_row(first, name, second, theirs[place], blocks.get(name, ""), readers))
        progress.advance(_nbytes(first, ours[place]) + _nbytes(second, theirs[place]))
    compared = [row for row in rows if row.norm is not None]
    totals = _Totals.of(compared)
    return Comparison(
        path=first.path,
        other=second.path,
        layers=rows,
        only_first=[name for place, name in ours.items() if place not in theirs],
        only_second=[name for place, name in theirs.items() if place not in ours],
        not_compared=_reasons(rows),
        compared=len(compared),
        cosine=totals.cosine,
        norm_ratio=totals.norm_ratio,
        interference=totals.interference,
        overlap_out=_mean(compared, [row.overlap_out for row in compared]),
        overlap_in=_mean(compared, [row.overlap_in for row in compared]),
        sign_conflict=_mean(compared, [row.sign_conflict for row in compared]),
    )


def _by_place(adapters: Sequence[Adapter]) -> list[dict[tuple[str, str], str]]:
    """Each adapter's modules by the layer they change.

    Raises
    ------
    IncompatibleError
        If one adapter names a layer twice.
    """
    known = [place for adapter in adapters for place in places(adapter.modules, ()).values()]
    found = []
    for adapter in adapters:
        names: dict[tuple[str, str], str] = {}
        for name, place in places(adapter.modules, known).items():
            if (other := names.setdefault(place, name)) != name:
                raise IncompatibleError(f"names the same layer as {other}", path=adapter.path, key=name)
        found.append(names)
    return found


def _row(
    first: Adapter, ours: str, second: Adapter, theirs: str, block: str, readers: Sequence[ChangeReader]
) -> PairRow:
    one, two = first.modules[ours], second.modules[theirs]
    names = PairRow(
        ours, theirs, component_of(ours), block, layer_kind(ours), one.detected.label, two.detected.label
    )
    found: list[LowRank] = []
    for reader, module in zip(readers, (one, two), strict=True):
        try:
            change = reader.read(module)
        except (NumericError, Unmeasured) as gap:
            return replace(names, reason=str(gap))
        if change.form is None:
            return replace(names, reason="changes a bias only")
        found.append(_factors(change))
    a, b = found
    if a.shape != b.shape:
        return replace(names, reason=f"sizes differ: {_size(a)} and {_size(b)}")
    alike = likeness(a, b)
    norm, other = alike.norms
    energy = norm**2 + other**2
    return replace(
        names,
        cosine=alike.cosine,
        norm=norm,
        other_norm=other,
        norm_ratio=other / norm if norm else None,
        overlap_out=alike.overlap_out,
        overlap_in=alike.overlap_in,
        interference=2 * alike.inner / energy if energy else None,
        sign_conflict=_sign_conflict(a, b, ours) if norm and other else None,
        reason="" if norm and other else "one of them changes nothing",
    )


def _nbytes(adapter: Adapter, name: str) -> int:
    return sum(adapter.store.info(key).nbytes for key in adapter.modules[name].keys.values())


def _factors(change: Change) -> LowRank:
    """The change as one product, whatever it is stored as."""
    form = change.form
    if isinstance(form, tuple):
        first, second = form[0], form[1].folded()
        form = LowRank(kron(first.up, second.up), kron(first.down, second.down))
    if form is None:
        raise TypeError("no weight change")
    return as_factors(form)


def _size(low: LowRank) -> str:
    return "x".join(map(str, low.shape))


def _sign_conflict(a: LowRank, b: LowRank, name: str) -> float | None:
    """Share of sampled elements with opposite signs; elements that either leaves alone do not count."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rows, columns = (torch.randperm(size, generator=generator)[:_SAMPLE].to(a.up.device) for size in a.shape)
    signs = [torch.sign(low.up[rows] @ low.down[:, columns]) for low in (a, b)]
    product = signs[0] * signs[1]
    counted = int((product != 0).sum())
    return int((product < 0).sum()) / counted if counted else None


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over the compared layers."""

    square: float
    other: float
    inner: float

    @classmethod
    def of(cls, rows: Sequence[PairRow]) -> _Totals:
        squares = [(row.norm or 0.0) ** 2 for row in rows]
        others = [(row.other_norm or 0.0) ** 2 for row in rows]
        inner = math.fsum(
            (row.interference or 0.0) * (one + two) / 2
            for row, one, two in zip(rows, squares, others, strict=True)
        )
        return cls(math.fsum(squares), math.fsum(others), inner)

    @property
    def cosine(self) -> float | None:
        return self.inner / math.sqrt(self.square * self.other) if self.square and self.other else None

    @property
    def norm_ratio(self) -> float | None:
        return math.sqrt(self.other / self.square) if self.square else None

    @property
    def interference(self) -> float | None:
        energy = self.square + self.other
        return 2 * self.inner / energy if energy else None


def _mean(rows: Sequence[PairRow], values: Sequence[float | None]) -> float | None:
    """Weighted by the product of the norms."""
    weights = [(row.norm or 0.0) * (row.other_norm or 0.0) for row in rows]
    known = [(weight, value) for weight, value in zip(weights, values, strict=True) if value is not None]
    total = math.fsum(weight for weight, _ in known)
    return math.fsum(weight * value for weight, value in known) / total if total else None


def _reasons(rows: Sequence[PairRow]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        if row.norm is None:
            found[row.reason] = found.get(row.reason, 0) + 1
    return found
