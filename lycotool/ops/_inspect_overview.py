"""One line for each of many files, from headers that a folder's files largely share."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from lycotool.algorithms import SLOT_NAMES
from lycotool.algorithms.base import DEFAULT_READING, MismatchError
from lycotool.algorithms.detection import detect
from lycotool.errors import BadInputError, LycotoolError
from lycotool.formats.keys import parse_keys
from lycotool.io.header import SplitHeader, read_split_header
from lycotool.models.architecture import guess_architecture
from lycotool.ops._adapter import algorithm_in_metadata
from lycotool.ops._findings import SEVERITIES, worst
from lycotool.ops._forked import mapped
from lycotool.ops.inspect import InspectOptions, InspectReport, inspect

Result = TypeVar("Result")


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
    # Warnings need the whole way.
    found = _from_header(name) if name.lower().endswith(".safetensors") and not options.strict else None
    return overview_of(inspect(name, options)) if found is None else found


def of_each(
    work: Callable[[str], Result], names: Sequence[str], *, at_once: bool = True
) -> Iterator[Result | LycotoolError]:
    """What ``work`` makes of each file, or why it fails, in order.

    Parameters
    ----------
    at_once
        Use several processors where files are many. For work that only reads headers: torch has
        threads, beside which no copy of the process can be made.
    """
    if not at_once:
        for name in names:
            try:
                yield work(name)
            except LycotoolError as error:
                yield error
        return

    def attempt(name: str) -> Result | None:
        try:
            return work(name)
        except LycotoolError:
            return None

    with _uncollected():
        for name, found in zip(names, mapped(attempt, names), strict=True):
            try:
                yield work(name) if found is None else found
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


def _from_header(name: str) -> Overview | None:
    """The line of an adapter without fault; None where a closer look is needed."""
    path = Path(name)
    try:
        if not path.is_file():
            return None
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            header = read_split_header(file, size, name)
    except (OSError, ValueError, BadInputError):
        return None
    if header is None or "lora_adapter_metadata" in header.metadata:
        return None
    said = [algorithm_in_metadata(header.metadata), *map(header.metadata.get, _ARCHITECTURES)]
    identity = json.dumps([header.data_bytes, *said]) + header.text
    mark = hashlib.sha256(identity.encode(errors="surrogatepass")).digest()
    if mark not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[mark] = _structure(header, *said)
    structure = _known[mark]
    return None if structure is None else replace(structure, path=name, bytes=size)


#: What like headers gave, by their hash: the files of a folder are often epochs of one training.
_known: dict[bytes, Overview | None] = {}
_MOST_KNOWN = 4096


def _structure(
    header: SplitHeader, hint: str | None, spec: str | None, base_model: str | None
) -> Overview | None:
    """What names and shapes tell; None where a closer look is needed."""
    tensors = header.columns()
    plan = None if tensors is None else _plan(tensors.names)
    if tensors is None or plan is None or not {*tensors.dtypes} <= _PLAIN_DTYPES:
        return None
    shapes = [*map(tuple, tensors.shapes), None]
    # Column by column: the first slot of every module, the second …
    columns = [[shapes[place] for place in places] for places in plan.places]
    modules = list(zip(plan.kinds, *columns, strict=True))
    forms: dict[tuple[object, ...], tuple[tuple[str, str], int | None]] = {}
    counts = Counter(modules)
    for module in counts:
        kind, *found = module
        form = _form(tuple(zip(plan.slots[kind], found, strict=False)), hint)
        if form is None:
            return None
        forms[module] = form
    kinds: Counter[str] = Counter()
    for module, number in counts.items():
        kinds[forms[module][0][0]] += number
    ordered = dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    labels = dict.fromkeys(label for label, _ in forms.values())
    ranks = tuple(dict.fromkeys(rank for kind in ordered for label, rank in labels if label == kind))
    widths = {
        name: width
        for name, module in zip(plan.names, modules, strict=True)
        if (width := forms[module][1]) is not None
    }
    metadata = {key: said or "" for key, said in zip(_ARCHITECTURES, (spec, base_model), strict=True)}
    return Overview(
        path="",
        kind="adapter",
        architecture=guess_architecture(plan.names, widths, metadata).name,
        types=ordered,
        ranks=ranks,
        modules=len(plan.names),
        faults=0,
        bytes=0,
    )


class _Plan(NamedTuple):
    """The modules of files with the same keys.

    ``kinds`` says by number which of ``slots`` a module has, and ``places`` where in the file the
    first, second … of them is, for every module; one beyond the last tensor where it has no more.
    """

    names: tuple[str, ...]
    kinds: tuple[int, ...]
    slots: tuple[tuple[str, ...], ...]
    places: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=16)
def _plan(names: tuple[str, ...]) -> _Plan | None:
    """Where every module's tensors are; None where some belong to no module."""
    keys = parse_keys(names, SLOT_NAMES)
    if not keys.modules or keys.clashes or keys.orphans or keys.unknown or keys.embeddings:
        return None
    place = {name: number for number, name in enumerate(names)}
    found = [tuple(module.slots) for module in keys.modules.values()]
    slots = {slots: number for number, slots in enumerate(dict.fromkeys(found))}
    places = zip_longest(
        *([place[key] for key in module.slots.values()] for module in keys.modules.values()),
        fillvalue=len(names),
    )
    return _Plan(tuple(keys.modules), tuple(slots[one] for one in found), tuple(slots), tuple(places))


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
