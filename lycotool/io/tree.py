"""Write a diffusers folder: every component's weights rewritten, everything else copied.

The new folder is built beside its final place under a temporary name and renamed at the
end, so that it appears whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lycotool.errors import OutputError
from lycotool.io.store import TensorStore
from lycotool.io.writer import TEMPORARY_PREFIX, FilePlan, Producer, TensorPlan, write_file

#: Other copies of the same weights; left behind because they would hold the old values.
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"})


@dataclass(frozen=True, slots=True)
class TreeTarget:
    """A folder to be written, made from another."""

    path: Path
    source: Path


def prepare_tree(output: str, source: Path, *, force: bool) -> TreeTarget:
    """Check that the folder ``output`` can be made, before any work is done.

    Raises
    ------
    OutputError
        If it exists (without ``force``), lies in or above the source, or cannot be made.
    """
    if output == "-":
        raise OutputError("a folder cannot be written to standard output", path=output)
    target = Path(os.path.realpath(output))
    origin = Path(os.path.realpath(source))
    if target == origin or origin.is_relative_to(target) or target.is_relative_to(origin):
        raise OutputError(f"overlaps the input folder {source}", path=output)
    if target.exists():
        if not target.is_dir():
            raise OutputError("is not a folder, and the output of a diffusers folder is one", path=output)
        if not force:
            raise OutputError("exists already", path=output, hint="use `--force` to replace it")
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist", path=output)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in the folder {target.parent}", path=output)
    return TreeTarget(target, origin)


def write_tree(
    target: TreeTarget,
    store: TensorStore,
    plans: Mapping[str, TensorPlan],
    produce: Producer,
    *,
    advance: Callable[[int], None],
) -> None:
    """Write the folder: one file for each file the store's tensors came from."""
    building = target.path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"
    names: dict[Path, dict[str, str]] = {}
    for key, entry in store.entries.items():
        names.setdefault(entry.file.path, {})[entry.name] = key
    components = {Path(os.path.realpath(path.parent)) for path in names}
    try:
        _copy_rest(target.source, building, components)
        for path, keys in names.items():
            place = building / os.path.relpath(path, store.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            metadata = store.entries[next(iter(keys.values()))].file.metadata
            plan = FilePlan({name: plans[key] for name, key in keys.items()}, metadata)

            def produce_named(name: str, keys: Mapping[str, str] = keys) -> Iterable[memoryview]:
                return produce(keys[name])

            write_file(place, plan, produce_named, advance=advance)
        replace_folder(building, target.path)
    except OSError as error:
        raise OutputError((error.strerror or str(error)).lower(), path=target.path) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _copy_rest(source: Path, building: Path, components: set[Path]) -> None:
    def old_weights(folder: str, names: list[str]) -> set[str]:
        if Path(os.path.realpath(folder)) not in components:
            return set()
        return {name for name in names if Path(name).suffix.lower() in _WEIGHT_SUFFIXES}

    shutil.copytree(source, building, ignore=old_weights)


def replace_folder(building: Path, target: Path) -> None:
    """Give the finished folder its name, putting an old one out of the way first."""
    if not target.exists():
        building.rename(target)
        return
    old = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.old")
    target.rename(old)
    try:
        building.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
