"""One line for each of many files, from headers that a folder's files largely share."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from lycotool.algorithms import SLOT_NAMES
from lycotool.algorithms.base import DEFAULT_READING, MismatchError
from lycotool.algorithms.detection import detect
from lycotool.errors import LycotoolError
from lycotool.formats.keys import parse_keys
from lycotool.io.header import TensorInfo
from lycotool.io.store import SafetensorsFile
from lycotool.models.architecture import guess_architecture
from lycotool.ops._adapter import algorithm_in_metadata
from lycotool.ops._findings import SEVERITIES, worst
from lycotool.ops._forked import mapped
from lycotool.ops.inspect import InspectOptions, InspectReport, inspect


@dataclass(frozen=True, slots=True)
class Overview:
    """One file in a table of many.

    Attributes
    ----------
    types, ranks
        Modules by kind, commonest first, and the ranks there are.
    strength, findings
        ``‖ΔW‖_F`` of the whole file and findings by severity, where they were asked for.
    """

    path: str
    kind: str
    architecture: str
    types: dict[str, int]
    ranks: tuple[str, ...]
    modules: int
    faults: int
    bytes: int
    strength: float | None = None
    findings: dict[str, int] | None = None
    severity: int = field(default=-1, repr=False)

    @property
    def largest_rank(self) -> int:
        """0 where there is none."""
        return max((int(rank) for rank in self.ranks if rank.isdigit()), default=0)


def overview_of(report: InspectReport) -> Overview:
    """The line of a file that was described in full."""
    found = [finding.severity for finding in report.findings or ()]
    highest = worst(report.findings or ())
    return Overview(
        path=report.path,
        kind=report.kind,
        architecture=report.architecture,
        types={row.type: row.modules for row in report.algorithms},
        ranks=tuple(dict.fromkeys(rank for row in report.algorithms for rank in row.rank)),
        modules=report.module_count,
        faults=len(report.faults),
        bytes=report.bytes,
        strength=None if report.stats is None else report.stats.totals.fro,
        findings=None if report.findings is None else {one: found.count(one) for one in dict.fromkeys(found)},
        severity=-1 if highest is None else SEVERITIES.index(highest),
    )


def overview(name: str, options: InspectOptions) -> Overview:
    """The line of a file, from its header: what :func:`inspect` says of it in short.

    Adapters in one safetensors file take a way that remembers what like headers gave, and reads
    no alphas; everything else, and every file with faults or leftovers, the whole one.

    Raises
    ------
    LycotoolError
        If the file cannot be read.
    """
    path = Path(name)
    if options.strict:  # warnings need the whole way
        return overview_of(inspect(name, options))
    if name.lower().endswith(".safetensors") and path.is_file() and os.access(path, os.R_OK):
        with contextlib.closing(SafetensorsFile(path, shown_as=name)) as file:
            said = (
                algorithm_in_metadata(file.metadata),
                *(file.metadata.get(key, "") for key in _ARCHITECTURES),
            )
            structure = _structure(_Tensors(file.tensors), *said)
            if structure is not None and "lora_adapter_metadata" not in file.metadata:
                return replace(structure, path=name, bytes=file.size)
    return overview_of(inspect(name, options))


def overviews(names: Sequence[str], options: InspectOptions) -> Iterator[Overview | LycotoolError]:
    """The line of each file, or why there is none, in order; on several processors where files are many."""

    def attempt(name: str) -> Overview | None:
        try:
            return overview(name, options)
        except LycotoolError:
            return None

    with _uncollected():
        for name, found in zip(names, mapped(attempt, names), strict=True):
            try:
                yield overview(name, options) if found is None else found
            except LycotoolError as error:
                yield error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no cycles: headers are a million small objects without one, a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


#: Metadata that :func:`lycotool.models.architecture.guess_architecture` looks at.
_ARCHITECTURES = ("modelspec.architecture", "ss_base_model_version")


class _Tensors(Mapping[str, TensorInfo]):
    """A header's tensors as a key: equal for headers that were parsed as one."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __hash__(self) -> int:
        return id(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensors) and self.tensors is other.tensors


@lru_cache(maxsize=64)
def _structure(tensors: _Tensors, hint: str | None, spec: str, base_model: str) -> Overview | None:
    """What names and shapes tell, once for files that are alike; None where a closer look is needed."""
    keys = parse_keys(tensors.tensors, SLOT_NAMES)
    if not keys.modules or keys.clashes or keys.orphans or keys.unknown or keys.embeddings:
        return None
    infos = tensors.tensors
    if not {info.dtype for info in infos.values()} <= _PLAIN_DTYPES:
        return None
    widths: dict[str, int] = {}
    forms: dict[tuple[str, str], int] = {}
    for module in keys.modules.values():
        form = _form(tuple((slot, infos[key].shape) for slot, key in module.slots.items()), hint)
        if form is None:
            return None
        kind, columns = form
        if columns is not None:
            widths[module.name] = columns
        forms[kind] = forms.get(kind, 0) + 1
    kinds: dict[str, int] = {}
    for (label, _), count in forms.items():
        kinds[label] = kinds.get(label, 0) + count
    ordered = dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    ranks = tuple(dict.fromkeys(rank for kind in ordered for label, rank in forms if label == kind))
    metadata = dict(zip(_ARCHITECTURES, (spec, base_model), strict=True))
    return Overview(
        path="",
        kind="adapter",
        architecture=guess_architecture(keys.modules, widths, metadata).name,
        types=ordered,
        ranks=ranks,
        modules=len(keys.modules),
        faults=0,
        bytes=0,
    )


#: dtypes that need no scale beside them; the alphas of other files are looked at too.
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@lru_cache(maxsize=4096)
def _form(
    slots: tuple[tuple[str, tuple[int, ...]], ...], hint: str | None
) -> tuple[tuple[str, str], int | None] | None:
    """Kind, rank as reports write it, and columns of the weight; None for no known module."""
    try:
        detected = detect(dict(slots), algorithm_hint=hint)
    except MismatchError:
        return None
    dims = detected.algorithm.dims(detected.layout, detected.sizes, None, DEFAULT_READING)
    rank = "full" if dims.rank is None else str(dims.rank)
    return (detected.label, rank), detected.layout.columns(detected.sizes)
