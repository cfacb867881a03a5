"""sd-scripts' dataset file: ``[general]``, ``[[datasets]]``, ``[[datasets.subsets]]``, TOML or JSON.

The lowest place that has a key wins: subset, dataset, general, command line. Unlike there, a
key that lycotool has no use for is an error unless its value changes nothing, and all bad keys
are reported together. What is left out has lycotool's defaults: buckets are on, captions are in
``.txt`` or ``.caption``. Relative paths are relative to the current folder, or, where they lead
nowhere from there, to the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lycotool.errors import BadInputError, UsageError
from lycotool.io.toml import read_toml
from lycotool.training.data.faults import Findings
from lycotool.training.data.folders import images_in, source_of
from lycotool.training.data.metadata import metadata_source
from lycotool.training.data.options import DataOptions, levels
from lycotool.training.data.sources import Source

#: Keys sd-scripts has and lycotool has not: the values that change nothing, and why.
UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "alpha_mask": ((False,), "losses masked by transparency are not supported"),
    "cache_info": ((True, False), "image sizes are read quickly without it"),
    "color_aug": ((False,), "colour augmentation is not supported"),
    "conditioning_data_dir": ((), "ControlNet is not supported"),
    "custom_attributes": (({},), "custom attributes are not supported"),
    "debug_dataset": ((False,), "`--dry-run` shows the data set"),
    "face_crop_aug_range": ((), "cropping around faces is not supported"),
    "network_multiplier": ((1, 1.0), "a multiplier per dataset is not supported"),
}

#: sd-scripts' other names of filters.
_FILTERS: Mapping[str, str] = {"cubic": "bicubic", "linear": "bilinear", "lanczos4": "lanczos"}

#: Keys that name files, and the place they belong to.
_PLACES = {"image_dir": "[[datasets.subsets]]", "metadata_file": "[[datasets.subsets]]"}


def is_dataset_file(path: Path) -> bool:
    """Whether a JSON or TOML file is a dataset file rather than metadata."""
    if path.suffix.lower() == ".toml":
        return True
    return path.suffix.lower() == ".json" and path.is_file() and "datasets" in _load(path)


def file_sources(path: Path, options: DataOptions, findings: Findings) -> list[Source]:
    """Every subset of a dataset file, with its options.

    Raises
    ------
    UsageError
        If there is no such file, or it has keys or values that cannot be used; all are listed.
    BadInputError
        If it is not TOML or JSON, or has no subset.
    """
    subsets = _subsets(path, _load(path), options)
    seen: set[tuple[int, Path]] = set()
    sources = []
    for subset in subsets:
        place = subset.metadata or subset.images
        assert place is not None
        if (subset.group, place.resolve()) in seen:
            findings.warnings.append(f"{place} is named twice in a dataset; the second is left out")
            continue
        seen.add((subset.group, place.resolve()))
        if subset.metadata is not None:
            sources.append(
                metadata_source(
                    subset.metadata, subset.options, findings, folder=subset.images, group=subset.group
                )
            )
        else:
            images = images_in(place, subset.options, findings)
            sources.append(source_of(place, images, subset.options, findings, group=subset.group))
    return sources


@dataclass(frozen=True, slots=True)
class _Subset:
    options: DataOptions
    group: int
    images: Path | None
    metadata: Path | None


@dataclass
class _Reader:
    """Walks the file and collects what is wrong with it."""

    path: Path
    faults: list[str] = field(default_factory=list)

    def table(self, value: object, place: str) -> Mapping[str, Any]:
        if isinstance(value, dict):
            return value
        self.faults.append(f"{place} is no table")
        return {}

    def tables(self, value: object, place: str) -> list[Mapping[str, Any]]:
        if isinstance(value, list):
            return [self.table(entry, place) for entry in value]
        self.faults.append(f"{place} is no list of tables")
        return []

    def options(self, table: Mapping[str, Any], place: str, allowed: frozenset[str]) -> dict[str, object]:
        """The options of a table; its faults are noted."""
        found: dict[str, object] = {}
        for key, given in table.items():
            alias = key == "resize_interpolation" and isinstance(given, str)
            value = _FILTERS.get(given, given) if alias else given
            if key in allowed and key in _TYPES:
                if _fits(_TYPES[key], value):
                    found[key] = _converted(key, value)
                else:
                    self.faults.append(f"{place} {key}: found {value!r}, expected {_expected(key)}")
            elif key not in allowed:
                self.faults.extend(_complaint(key, value, place, allowed))
        return found


def _subsets(path: Path, document: Mapping[str, Any], options: DataOptions) -> list[_Subset]:
    reader = _Reader(path)
    for key in document.keys() - {"general", "datasets"}:
        reader.faults.extend(_complaint(key, document[key], "the file", frozenset({"general", "datasets"})))
    level = levels()
    of_subsets = frozenset(name for name, where in level.items() if where == "subset")
    of_datasets = of_subsets | {name for name, where in level.items() if where == "dataset"}
    above = of_datasets - {"is_reg"}
    general = reader.options(reader.table(document.get("general", {}), "[general]"), "[general]", above)
    found = []
    for group, dataset in enumerate(reader.tables(document.get("datasets", []), "[[datasets]]")):
        place = f"[[datasets]] {group + 1}"
        shared = {**general, **reader.options(dataset, place, above | {"subsets"})}
        subsets = reader.tables(dataset.get("subsets", []), f"{place} subsets")
        if len({"metadata_file" in subset for subset in subsets}) > 1:
            reader.faults.append(f"{place} mixes subsets with and without metadata_file")
        for number, subset in enumerate(subsets):
            where = f"{place} subset {number + 1}"
            own = {**shared, **reader.options(subset, where, of_subsets | _PLACES.keys())}
            found.append(_subset(reader, subset, where, group, options, own))
    if reader.faults:
        count = "a key" if len(reader.faults) == 1 else f"{len(reader.faults)} keys"
        raise UsageError(f"{count} of the dataset file cannot be used", path=path, details=reader.faults)
    if not found:
        raise BadInputError("has no [[datasets.subsets]]", path=path)
    return [subset for subset in found if subset is not None]


def _subset(
    reader: _Reader,
    table: Mapping[str, Any],
    place: str,
    group: int,
    options: DataOptions,
    own: Mapping[str, Any],
) -> _Subset | None:
    paths: dict[str, Path | None] = dict.fromkeys(_PLACES)
    for key in _PLACES:
        if isinstance(table.get(key), str) and "\0" not in table[key]:
            try:
                paths[key] = _located(table[key], reader.path)
            except OSError as error:  # a name too long
                reader.faults.append(f"{place} {key}: {str(error.strerror).lower()}")
        elif key in table:
            reader.faults.append(f"{place} {key}: found {table[key]!r}, expected a path")
    if "image_dir" not in table and "metadata_file" not in table:
        reader.faults.append(f"{place} has neither image_dir nor metadata_file")
    try:
        merged = replace(options, **own)
    except UsageError as error:
        reader.faults.append(f"{place} {error.message}")
        return None
    return _Subset(merged, group, paths["image_dir"], paths["metadata_file"])


def _complaint(key: str, value: object, place: str, allowed: frozenset[str]) -> list[str]:
    """Why a key cannot stand there; nothing if it changes nothing."""
    if key in UNSUPPORTED:
        harmless, reason = UNSUPPORTED[key]
        return [] if value in harmless else [f"{place} {key}: {reason}"]
    level = levels().get(key)
    if level == "run":
        return [f"{place} {key}: is an option of the command line"]
    if level == "dataset":
        return [f"{place} {key}: belongs to [general] or [[datasets]]"]
    if key in _PLACES or key == "is_reg":
        return [f"{place} {key}: belongs to [[datasets.subsets]]"]
    near = difflib.get_close_matches(key, sorted(allowed), n=1)
    return [f"{place} {key}: unknown key" + (f", did you mean {near[0]}?" if near else "")]


def _located(name: str, file: Path) -> Path:
    path = Path(name)
    beside = file.parent / path
    return beside if not path.exists() and beside.exists() else path


def _load(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".toml":
        return read_toml(path)
    try:
        document = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        raise BadInputError(f"is not JSON: {error}", path=path) from None
    if not isinstance(document, dict):
        raise BadInputError("is no dataset file: expected an object", path=path)
    return document


_TYPES = get_type_hints(DataOptions)


def _fits(hint: object, value: object) -> bool:
    """Whether a value of TOML is of an option's type; an integer is a number, a boolean is not."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        pair = value if isinstance(value, list) else [value, value]
        return len(pair) == 2 and all(_fits(int, side) for side in pair)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def _converted(key: str, value: Any) -> object:  # noqa: ANN401
    if key != "resolution":
        return value
    return tuple(value) if isinstance(value, list) else (value, value)


def _expected(key: str) -> str:
    hint = _TYPES[key]
    options = [part for part in get_args(hint) if part is not type(None)] or [hint]
    if key == "resolution":
        return "a number of pixels, or [width, height]"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[options[0]]
