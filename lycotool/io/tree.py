"""Write a diffusers folder: every component's weights rewritten, everything else copied.

The new folder is built beside its final place under a temporary name and renamed at the
end, so that it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lycotool.errors import BadInputError, OutputError
from lycotool.io.nameless import exchange, flush_name, fsync_folder, temporary_beside, uninterrupted
from lycotool.io.preflight import check_space, how_to_make, reason_of
from lycotool.io.shards import OutputFile
from lycotool.io.store import TensorStore
from lycotool.io.writer import Check, Producer, write_file

#: Other copies of the same weights; left behind because they would hold the old values.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")
_INDEXES = (".safetensors.index", ".bin.index")


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
        raise OutputError(
            f"the folder {target.parent} does not exist", path=output, hint=how_to_make(target.parent)
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in the folder {target.parent}", path=output)
    return TreeTarget(target, origin)


def weight_files(store: TensorStore) -> dict[str, str]:
    """Each tensor's file below the folder, as this program would name it: no pickles."""
    names: dict[str, str] = {}
    for key, entry in store.entries.items():
        name = PurePosixPath(Path(os.path.relpath(entry.file.path, store.path)).as_posix())
        if name.suffix == ".bin":
            stem = "diffusion_pytorch_model" if name.stem.startswith("diffusion") else "model"
            name = name.with_name(f"{stem}.safetensors")
        names[key] = str(name)
    return names


def write_tree(
    target: TreeTarget,
    files: Sequence[OutputFile],
    texts: Mapping[str, str],
    produce: Producer,
    *,
    plain: frozenset[str] = frozenset(),
    advance: Callable[[int], None] = lambda nbytes: None,
    check: Check | None = None,
) -> None:
    """Write the folder.

    Parameters
    ----------
    texts
        Contents of further files by name, such as the indexes of shards.
    plain
        Components whose ``config.json`` shall no longer say that they are quantised.

    Raises
    ------
    OutputError
        If anything fails. The target is then as it was.
    """
    building = temporary_beside(target.path)
    check_space(target.path, sum(file.plan.nbytes for file in files))
    components = {str(PurePosixPath(file.name).parent) for file in files}
    try:
        _copy_rest(target.source, building, {target.source / name for name in components})
        for file in files:
            place = building / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, file.plan, file.producer(produce), advance=advance, check=check, flushed=False)
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")
        for name in plain:
            _forget_quantisation(building / name / "config.json")
        flush_files(building)
        replace_folder(building, target.path)
    except OSError as error:
        raise OutputError(reason_of(error), path=target.path) from error
    except OutputError as error:  # of a file below the temporary name, which says nothing to the user
        raise OutputError(error.message, path=target.path, hint=error.hint) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _copy_rest(source: Path, building: Path, components: set[Path]) -> None:
    def old_weights(folder: str, names: list[str]) -> set[str]:
        if Path(folder) not in components:
            return set()
        return {
            name
            for name in names
            if name.lower().endswith(_WEIGHT_SUFFIXES)
            or (name.endswith(".json") and any(index in name for index in _INDEXES))
        }

    shutil.copytree(source, building, ignore=old_weights)


def _forget_quantisation(config: Path) -> None:
    """Take the entry away by which loaders expect scales beside the weights."""
    if not config.is_file():
        return
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"not valid JSON: {error}", path=config) from None
    if not isinstance(document, dict):
        raise BadInputError("the JSON is not an object", path=config)
    if document.pop("quantization_config", None) is not None:
        config.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(building: Path, target: Path) -> None:
    """Give the finished folder its name.

    Where the system can exchange two folders in one step, there is no instant without one of
    them; elsewhere an old one is put out of the way first.

    Raises
    ------
    OSError
        If anything fails. What comes after the new name says that it was written.
    """
    with uninterrupted():
        if not target.exists():
            building.rename(target)
            flush_name(target)
            return
        old = building
        if not exchange(building, target):
            old = temporary_beside(target, "old")
            target.rename(old)
            try:
                building.rename(target)
            except BaseException:
                old.rename(target)
                raise
        flush_name(target)
        try:
            shutil.rmtree(old)
        except OSError as error:
            reason = f"was written, but the older {old} cannot be removed: {reason_of(error)}"
            raise OSError(error.errno, reason) from error


def flush_files(folder: Path) -> None:
    """Have every file of a folder on disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(place) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(place))
