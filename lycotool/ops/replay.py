"""merge --replay: make a merged file again from what its metadata says, to the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lycotool import __version__
from lycotool.errors import CheckError, UsageError
from lycotool.io.open import open_store
from lycotool.io.shards import stem_of
from lycotool.ops._common import Progress
from lycotool.ops._merge_adapters import AdapterMergeResult
from lycotool.ops._merge_options import merge_options
from lycotool.ops._origin import weights_sha256
from lycotool.ops._recipe import recorded_recipe
from lycotool.ops.bake import BakeResult
from lycotool.ops.merge import merge


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What the replayed merge gave, and whether its bytes are those of the file.

    ``same_bytes`` is None where nothing was written.
    """

    result: BakeResult | AdapterMergeResult
    same_bytes: bool | None
    warnings: tuple[str, ...]


def replay(
    merged: str,
    folders: Sequence[str],
    values: Mapping[str, object],
    *,
    progress: Progress | None = None,
) -> ReplayResult:
    """Merge again what ``merged`` was merged from.

    Parameters
    ----------
    merged
        A file, sharded checkpoint or folder that `merge` wrote.
    folders
        Where to look for its inputs first; then beside it and in the current folder.
    values
        Options that do not change the result, by name: where to write, on which device.

    Raises
    ------
    UsageError
        If it has no recipe, an input is missing, or the output is not a file to compare.
    CheckError
        If an input has changed, or the same version of lycotool gives other bytes.
    """
    with open_store(merged) as store:
        beside = Path(merged).parent
        recipe = recorded_recipe(store, [*folders, str(beside), "."])
        version = next((v for f in store.opened if (v := f.metadata.get("lycotool.version"))), "unknown")
        expected = weights_sha256(store)
    name = Path(merged).name
    again = f"{stem_of(name)}-replayed{name[len(stem_of(name)) :]}"
    options = merge_options({"output": again, **recipe.values, **values})
    if options.output == "-":
        raise UsageError("`--replay` compares files, so it writes none to standard output")
    known = recipe.checked_hashes(allow_pickle=options.allow_pickle)
    result = merge(recipe.inputs[0], recipe.inputs[1:], options, progress=progress, known_hashes=known)
    warnings = (
        ()
        if version == __version__
        else (f"{merged}: was written by lycotool {version}, this is {__version__}",)
    )
    if result.dry_run:
        return ReplayResult(result, None, warnings)
    with open_store(result.output) as store:
        same = weights_sha256(store) == expected
    if not same and version == __version__:
        raise CheckError(
            f"differs from {merged}, though its inputs are the same",
            path=result.output,
            hint="another kind of device, or another version of PyTorch, can round differently",
        )
    return ReplayResult(result, same, warnings)
