"""Recipes of `merge`: its inputs and options as a TOML file, or as a merged file's metadata says them.

Keys are the names of the options without dashes in front, and ``inputs``: a list, BASE first,
of texts as on the command line (``"style.safetensors:0.7:te=0.5"``) or of tables with ``file``
and any of ``strength te unet lbw density gamma epsilon sha256``. A file with a ``sha256`` must
have it. Relative paths start at the recipe's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from lycotool.errors import BadInputError, CheckError, UnsafeError, UsageError
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.io.toml import read_toml
from lycotool.ops._adapter import AdapterInput
from lycotool.ops._inputs import parse_input
from lycotool.ops._merge_options import OPTIONS, merge_options, unknown
from lycotool.ops._origin import RECIPE_VERSION, input_sha256

#: Options that name files whose hashes are recorded.
_FILES = ("base", "vae")

#: Keys of an input that are numbers.
_NUMBERS = ("strength", "te", "unet", "density", "gamma", "epsilon")


@dataclass(frozen=True)
class Recipe:
    """Inputs, options by name, and the hashes that inputs must have, by path."""

    inputs: tuple[AdapterInput, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def checked_hashes(self, *, allow_pickle: bool) -> dict[str, str]:
        """The hashes of the inputs that must have a certain one, which they have.

        Raises
        ------
        CheckError
            Naming a file, the hash it must have, and the one it has.
        """
        for path, expected in self.sha256.items():
            with open_store(path, allow_pickle=allow_pickle) as store:
                found = input_sha256(store)
            if found != expected:
                raise CheckError(
                    "is not the file that the recipe names",
                    path=path,
                    details=[f"expected sha256 {expected}", f"found    sha256 {found}"],
                )
        return dict(self.sha256)


def read_recipe(path: str) -> Recipe:
    """A recipe from a TOML file.

    Raises
    ------
    UsageError
        If the file does not exist, a key is unknown, or a value is not what it must be.
    BadInputError
        If it is no TOML.
    """
    document = read_toml(path)
    folder = Path(path).parent
    try:
        inputs = document.pop("inputs", [])
        if not isinstance(inputs, list):
            raise UsageError(f"inputs is {inputs!r}, expected a list")
        read = [_input(one, folder) for one in inputs]
        for name, value in document.items():
            option = OPTIONS.get(name)
            if option is None:
                raise unknown(name, ("inputs", *OPTIONS))
            if isinstance(value, str) and value != "-":
                if option.is_path:
                    document[name] = _under(folder, value)
                elif name == "lbw":
                    document[name] = _block_file(folder, value)
        merge_options(document)
    except UsageError as error:
        raise UsageError(error.message, path=path, hint=error.hint) from None
    return _recipe(read, document)


def recorded_recipe(store: TensorStore, folders: Sequence[str]) -> Recipe:
    """The recipe in the metadata of a file that `merge` wrote.

    Parameters
    ----------
    folders
        Where its inputs may be, the first with a file of that name counts.

    Raises
    ------
    UsageError
        If the file has no recipe, or an input is in none of the folders.
    BadInputError
        If the recipe is damaged, or of a later version of the format.
    UnsafeError
        If it names a file outside the folders.
    """
    texts = (file.metadata.get("lycotool.merge") for file in store.opened)
    text = next((text for text in texts if text is not None), None)
    if text is None:
        raise UsageError("does not say what it was merged from", path=store.path,
                         hint="only files that `lycotool merge` wrote do")  # fmt: skip
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or "inputs" not in document:
            raise UsageError("has no recipe: it was merged before recipes were recorded")
        if document.pop("recipe", None) != RECIPE_VERSION:
            raise UsageError("its recipe is of another version of the format")
        inputs = document.pop("inputs")
        also = {name: document[name] for name in _FILES if name in document}
        hashed = [*inputs, *also.values()]
        for one in hashed:
            if not isinstance(one, dict) or not isinstance(one.get("sha256"), str):
                raise UsageError(f"an input of its recipe has no hash: {one!r}")
            one["file"] = _found(one.get("file"), one["sha256"], folders, store.path)
        read = [_input(one, Path()) for one in inputs]
        document |= {name: one["file"] for name, one in also.items()}
        merge_options(document)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInputError(f"its recipe is damaged: {error}", path=store.path) from None
    except UsageError as error:
        if error.path is not None:
            raise
        raise BadInputError(f"its recipe cannot be read: {error.message}", path=store.path) from None
    recipe = _recipe(read, document)
    return replace(recipe, sha256={**recipe.sha256, **{one["file"]: one["sha256"] for one in also.values()}})


def _recipe(read: Sequence[tuple[AdapterInput, str | None]], values: Mapping[str, object]) -> Recipe:
    hashes = {named.path: sha256 for named, sha256 in read if sha256 is not None}
    return Recipe(tuple(named for named, _ in read), dict(values), hashes)


def _input(given: object, folder: Path) -> tuple[AdapterInput, str | None]:
    """One input, and the hash it must have.

    Raises
    ------
    UsageError
        If it is neither a text nor a table of known keys and right types.
    """
    if isinstance(given, str):
        return parse_input(given if given == "-" else _under(folder, given), methods=True), None
    if not isinstance(given, dict):
        raise UsageError(f"an input is {given!r}, expected a text or a table")
    table: dict[str, Any] = dict(given)
    file, lbw, sha256 = (table.pop(name, None) for name in ("file", "lbw", "sha256"))
    if not isinstance(file, str) or not file:
        raise UsageError(f"an input has no file: {given!r}")
    numbers: dict[str, float] = {}
    for name, value in table.items():
        if name not in _NUMBERS:
            raise unknown(name, ("file", "lbw", "sha256", *_NUMBERS))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{name} of {file} is {value!r}, expected a number")
        numbers[name] = float(value)
    for name, text in (("lbw", lbw), ("sha256", sha256)):
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{name} of {file} is {text!r}, expected a text")
    path = file if file == "-" else _under(folder, file)
    blocks = None if lbw is None else _block_file(folder, lbw)
    return AdapterInput(path, lbw=blocks, **{"strength": 1.0, **numbers}), sha256


def _under(folder: Path, path: str) -> str:
    """A path as it is seen from here; one that stays in this folder is left as it is written."""
    return path if Path(path).is_absolute() or folder == Path() else str(folder / path)


def _block_file(folder: Path, text: str) -> str:
    """Block weights as text, the path of a file of them (``FILE#NAME``) as it is seen from here."""
    name = text.partition("#")[0]
    return _under(folder, text) if "," not in text and (folder / name).is_file() else text


def _found(name: object, sha256: str, folders: Sequence[str], path: str) -> str:
    """Where an input of a recorded recipe is.

    Raises
    ------
    UnsafeError
        If the name is no plain name of a file.
    UsageError
        If no folder has it.
    """
    if not isinstance(name, str):
        raise BadInputError("its recipe names no file", path=path)
    if name == "-":
        raise UsageError("one of its inputs came from standard input and has no name", path=path)
    if name in ("", ".", "..") or "\0" in name or PureWindowsPath(name).name != name:
        raise UnsafeError(f"its recipe names a file outside its folder: {name!r}", path=path)
    for folder in folders:
        if (Path(folder) / name).exists():
            return _under(Path(folder), name)
    raise UsageError(
        f"an input is missing: {name}",
        path=path,
        details=[f"expected sha256 {sha256}", "found    no such file in " + ", ".join(folders)],
        hint="`--inputs-dir DIR` says where it is",
    )
