"""Open whatever a user names: a file, ``-``, a sharded index, a diffusers or PEFT folder."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from lycotool.errors import BadInputError, IncompatibleError, ResourceError, UnsafeError, UsageError
from lycotool.io.nearest import nearest_file
from lycotool.io.preflight import reason_of
from lycotool.io.store import Entry, SafetensorsFile, TensorFile, TensorStore, unreadable

#: huggingface_hub's limit for an index file.
_MAX_INDEX_BYTES = 10 * 2**20

#: Component folders of a diffusers pipeline that hold weights.
_COMPONENTS = (
    "unet", "transformer", "transformer_2", "prior", "decoder",
    "text_encoder", "text_encoder_2", "text_encoder_3", "vae",
)  # fmt: skip

#: Weight files inside a component or PEFT folder, best first.
_WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors", "model.safetensors", "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin", "pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip

#: An index, or diffusers' index of a variant.
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")


def exists(name: str | Path) -> bool:
    """Whether there is such a file or folder; no name is too long or too odd to ask."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def open_store(name: str, *, allow_pickle: bool = False) -> TensorStore:
    """Open a checkpoint or adapter by the name a user gave.

    Parameters
    ----------
    name
        A path, or ``-`` for a safetensors byte stream on standard input.
    allow_pickle
        Read ``.pt``, ``.ckpt`` and ``.bin`` files too, with ``weights_only=True``.

    Raises
    ------
    UsageError
        No such file, or a folder of an unknown kind.
    BadInputError, UnsafeError
        A damaged file; a pickle or a shard path that leaves its folder.
    """
    if name == "-":
        return _single(_stdin_once(), shown_as="-", allow_pickle=False)
    path = Path(name)
    try:
        if path.is_symlink() and not path.exists():
            raise UsageError("this symlink leads nowhere", path=name)
        if not path.exists():
            raise UsageError("no such file", path=name, hint=nearest_file(path))
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise UsageError(f"no file can have this name: {error}", path=name[:200]) from None
    if path.is_dir():
        return _open_folder(path, allow_pickle=allow_pickle)
    if _INDEX.search(path.name):
        return _sharded(path)
    return _single(path, shown_as=name, allow_pickle=allow_pickle)


def open_component(name: str, *, allow_pickle: bool = False) -> TensorStore:
    """Open one model of a pipeline, such as a VAE: as :func:`open_store`, or a folder with its weights.

    Raises
    ------
    UsageError, BadInputError, UnsafeError
        As :func:`open_store` says.
    """
    folder = Path(name)
    if folder.is_dir() and any((folder / weights).is_file() for weights in _WEIGHT_NAMES):
        return _weights_in(folder, allow_pickle=allow_pickle)
    return open_store(name, allow_pickle=allow_pickle)


def _single(path: Path, *, shown_as: str, allow_pickle: bool) -> TensorStore:
    file = _open_file(path, shown_as=shown_as, allow_pickle=allow_pickle)
    rows = zip(itertools.repeat(file), file.tensors)
    # What ``Entry(…)`` comes to in the end; a folder has a million of them.
    entries: dict[str, Entry] = dict(
        zip(file.tensors, map(tuple.__new__, itertools.repeat(Entry), rows), strict=False)
    )
    return TensorStore(shown_as, "file", entries, file.metadata, opened=(file,))


def _open_file(path: Path, *, shown_as: str, allow_pickle: bool) -> TensorFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInputError("not a regular file", path=shown_as)
        if path.suffix.lower() != ".safetensors":
            from lycotool.io.pickles import PickleFile, is_pickle

            if is_pickle(path):
                if allow_pickle:
                    return PickleFile(path)
                raise UnsafeError(
                    "this is a PyTorch pickle, which can run code when it is read",
                    path=shown_as,
                    hint="convert it to safetensors, or use `--allow-pickle` to read plain tensors only",
                )
        return SafetensorsFile(path, shown_as=shown_as)
    except OSError as error:
        raise unreadable(error, shown_as) from None


#: Standard input that was read: it comes once.
_read: list[object] = []


def _stdin_once() -> Path:
    if any(stream is sys.stdin for stream in _read) and sys.stdin is not None:
        raise UsageError("standard input was read already: `-` can stand for one file", path="-",
                         hint="name the others, or use a shell's `<(…)`")  # fmt: skip
    path = _spool_stdin()
    _read[:] = [sys.stdin]
    return path


def _spool_stdin() -> Path:
    """Copy standard input to a temporary file: the header must be read before the data."""
    import atexit
    import shutil
    import tempfile

    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "`-` reads a safetensors file from standard input, which is a terminal here",
            hint="pipe a file in, or name one",
        )
    folder = Path(tempfile.mkdtemp(prefix="lycotool-stdin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "stdin.safetensors"
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    except OSError as error:
        raise ResourceError(f"standard input cannot be kept in {folder}: {reason_of(error)}", path="-",
                            hint="TMPDIR names another folder for temporary files") from error  # fmt: skip
    return path


def _open_folder(folder: Path, *, allow_pickle: bool) -> TensorStore:
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        weights = _weights_in(folder, allow_pickle=allow_pickle)
        return replace(weights, path=str(folder), kind="peft", config=config)
    components = [folder / name for name in _COMPONENTS if (folder / name).is_dir()]
    if components:
        return _diffusers(folder, components, allow_pickle=allow_pickle)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _sharded(indexes[0])
    raise UsageError(
        "is a directory, but neither a diffusers folder, a PEFT folder nor a sharded checkpoint",
        path=folder,
        hint="name a .safetensors file, or a folder with model_index.json or adapter_config.json",
    )


def _diffusers(folder: Path, components: Sequence[Path], *, allow_pickle: bool) -> TensorStore:
    entries: dict[str, Entry] = {}
    opened: list[TensorFile] = []
    warnings: list[str] = []
    with ExitStack() as stack:
        for component in components:
            weights = stack.enter_context(_weights_in(component, allow_pickle=allow_pickle))
            entries |= {f"{component.name}.{name}": e for name, e in weights.entries.items()}
            opened += weights.opened
            warnings += weights.warnings
        stack.pop_all()  # the files are the store's from here
    return TensorStore(str(folder), "diffusers", entries, {}, warnings=tuple(warnings), opened=tuple(opened))


def _weights_in(folder: Path, *, allow_pickle: bool) -> TensorStore:
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return open_store(str(folder / name), allow_pickle=allow_pickle)
    raise BadInputError("this folder has no weights file", path=folder)


def _sharded(index: Path) -> TensorStore:
    """Open a sharded checkpoint; every shard must hold exactly what the index says."""
    document = read_json(index)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadInputError("weight_map is missing or is not a map of names to files", path=index)
    if not weight_map:
        raise IncompatibleError("the index lists no tensors", path=index)
    with ExitStack() as opened:
        files: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            files[shard] = _open_shard(index, shard)
            opened.callback(files[shard].close)
        _check_shards(index, weight_map, files)
        opened.pop_all()  # the files are the store's from here
    entries = {name: Entry(files[weight_map[name]], name) for name in sorted(weight_map)}
    nbytes = sum(entry.info.nbytes for entry in entries.values())
    about = document.get("metadata")
    total = about.get("total_size") if isinstance(about, dict) else None
    warnings = (
        (f"{index}: total_size is {total}, the tensors have {nbytes} bytes",)
        if isinstance(total, int) and total != nbytes
        else ()
    )
    shards = tuple(files.values())
    return TensorStore(str(index), "sharded", entries, shards[0].metadata, warnings=warnings, opened=shards)


def _check_shards(index: Path, weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> None:
    """Every tensor in exactly the one shard the index says."""
    faults = [
        f"{name}: not in {shard}, where the index says it is"
        for name, shard in weight_map.items()
        if name not in files[shard].tensors
    ]
    faults += [
        f"{name}: in {shard}, but the index "
        + (f"says {weight_map[name]}" if name in weight_map else "does not list it")
        for shard, file in files.items()
        for name in file.tensors
        if weight_map.get(name) != shard
    ]
    if faults:
        raise BadInputError("index and shards disagree", path=index, details=faults)


def _open_shard(index: Path, shard: str) -> SafetensorsFile:
    """Open one shard of an index, which may name nothing outside its own folder."""
    if "://" in shard:
        raise UnsafeError(f"the index names a shard by URL ({shard}); nothing is fetched", path=index)
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    if posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root:
        raise UnsafeError(f"the index names a shard by an absolute path: {shard}", path=index)
    if "\0" in shard or ".." in posix.parts or ".." in windows.parts:
        raise UnsafeError(f"the index names a shard outside its folder: {shard}", path=index)
    if not shard.endswith(".safetensors"):
        if shard.endswith(".index.json"):
            raise BadInputError(f"the index names an index.json as a shard: {shard}", path=index)
        raise UnsafeError(f"the index names a shard that is not a .safetensors file: {shard}", path=index)
    path = index.parent / shard
    if not exists(path) or not path.is_file():
        raise BadInputError(f"the shard {shard[:500]} is missing", path=index)
    if not _stays_inside(path, index.parent):
        raise UnsafeError(f"the shard {shard} is a symlink that leaves the folder", path=index)
    return SafetensorsFile(path)


def _stays_inside(path: Path, folder: Path) -> bool:
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return True
    # The Hugging Face cache links models--*/snapshots/REV/FILE to models--*/blobs/HASH.
    for parent in root.parents:
        if parent.name.startswith("models--") and root.is_relative_to(parent / "snapshots"):
            return real.is_relative_to(parent / "blobs")
    return False


def read_json(path: Path) -> dict[str, object]:
    """Read a small JSON file that holds one object.

    Raises
    ------
    BadInputError
        If it is too large, not valid, has a key twice or is no object.
    """

    def refuse_duplicates(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise BadInputError("duplicate key in this JSON file", path=path)
        return found

    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise BadInputError(f"larger than {_MAX_INDEX_BYTES} bytes", path=path)
        text = path.read_text(encoding="utf-8-sig")
        document = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"not valid JSON: {error}", path=path) from None
    except OSError as error:
        raise unreadable(error, path) from None
    if not isinstance(document, dict):
        raise BadInputError("the JSON is not an object", path=path)
    return document
