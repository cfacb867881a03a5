"""What a merged file was made from, as its metadata says it: inputs with hashes, and every option."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from lycotool.io.store import CHUNK_BYTES, SafetensorsFile, TensorStore, reading
from lycotool.ops._common import provenance

#: The form of the recipe in the metadata; raised when an older reader would misread it.
RECIPE_VERSION = 1

#: What stands for a hash until it is known.
_UNKNOWN = "0" * 64


class Stopped(Exception):  # noqa: N818 - no error: nobody waits for it
    """The hash is no longer wanted."""


@dataclass
class Hashes:
    """SHA-256 of inputs, computed beside the work that reads them.

    A context manager: leaving it stops what is still being computed.

    Parameters
    ----------
    known
        Hashes by what the user named, computed before.
    """

    known: Mapping[str, str] = field(default_factory=dict)
    _found: dict[str, Future[str]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "lycotool-inputs"))

    def __enter__(self) -> Hashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, store: TensorStore, *, in_passing: bool = False) -> None:
        """Have the hash of an input computed, after those begun before.

        Parameters
        ----------
        in_passing
            From what the work reads of it in the order of its files; else small files are read whole now,
            and the work finds them in memory.
        """
        if store.path in self.known or store.path in self._found:
            return
        if in_passing:
            for file in safetensors_files(store):
                file.hash_in_passing()
        else:
            self._found[store.path] = self._pool.submit(_kept_sha256, store, self._stop)

    def of(self, store: TensorStore) -> str:
        """The hash of an input, once it is there."""
        if store.path in self.known:
            return self.known[store.path]
        if store.path not in self._found:
            self._found[store.path] = self._pool.submit(input_sha256, store, self._stop)
        return self._found[store.path].result()


def safetensors_files(store: TensorStore) -> list[SafetensorsFile]:
    """The files of a store that can be hashed while they are read."""
    return [file for file in store.opened if isinstance(file, SafetensorsFile)]


def _kept_sha256(store: TensorStore, stop: threading.Event) -> str:
    """:func:`input_sha256` of what is small enough to be kept in memory for those who read it next."""
    for file in safetensors_files(store):
        file.keep()
    return input_sha256(store, stop)


def input_sha256(store: TensorStore, stop: threading.Event | None = None) -> str:
    """SHA-256 of an input: of the file, or of the names and hashes of a folder's or set's files.

    Raises
    ------
    BadInputError
        If a file cannot be read.
    """
    files = list(store.files)
    if store.kind == "file" and len(files) == 1:
        return _file_sha256(store, files[0], stop)
    root = Path(store.path)
    if store.kind == "peft":
        files.append(root / "adapter_config.json")
    elif store.kind == "sharded":
        files.append(root)
        root = root.parent
    whole = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        whole.update(f"{name}\0{_file_sha256(store, path, stop)}\n".encode())
    return whole.hexdigest()


def weights_sha256(store: TensorStore) -> list[str]:
    """SHA-256 of every file of weights, in the order of their names, which do not count."""
    return [_file_sha256(store, path, None) for path in sorted(store.files)]


def _file_sha256(store: TensorStore, path: Path, stop: threading.Event | None) -> str:
    """SHA-256 of one file of a store, from what has been read of it as far as it goes."""

    def look() -> None:
        if stop is not None and stop.is_set():
            raise Stopped

    for opened in safetensors_files(store):
        if opened.path == path:
            return opened.sha256(look)
    hasher = hashlib.sha256()
    with reading(path), path.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES):
            look()
            hasher.update(piece)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Origin:
    """Everything that the bytes of a merged file depend on.

    Attributes
    ----------
    inputs
        Each with what the recipe says of it beside its name and hash.
    also
        Files that options name, by the option.
    values
        The options that are not at their defaults, by name.
    hashes
        None for a plan, which needs no hashes.
    """

    inputs: Sequence[tuple[TensorStore, Mapping[str, object]]]
    also: Mapping[str, TensorStore]
    values: Mapping[str, object]
    hashes: Hashes | None

    def with_value(self, name: str, value: object) -> Origin:
        """The same with one more option."""
        return replace(self, values={**self.values, name: value})

    def begin(self, streamed: TensorStore | None = None) -> None:
        """Have the hashes computed.

        Parameters
        ----------
        streamed
            An input that is about to be read in the order of its files, and hashed in passing.
        """
        if self.hashes is not None:
            for store, _ in self.inputs:
                self.hashes.begin(store, in_passing=store is streamed)
            for store in self.also.values():
                self.hashes.begin(store)

    def metadata(self) -> dict[str, str]:
        """The entries of the metadata, with stand-ins for the hashes."""
        return self._entries(settled=False)

    def settled(self) -> dict[str, str]:
        """The same with the hashes; waits for them."""
        return self._entries(settled=True)

    def sha256(self, store: TensorStore) -> str:
        """The hash of one input, or its stand-in in a plan."""
        return _UNKNOWN if self.hashes is None else self.hashes.of(store)

    def _entries(self, *, settled: bool) -> dict[str, str]:
        def named(store: TensorStore) -> dict[str, object]:
            name = store.path if store.path == "-" else Path(store.path).resolve().name
            return {"file": name, "sha256": self.sha256(store) if settled else _UNKNOWN}

        recipe: dict[str, object] = {"recipe": RECIPE_VERSION}
        recipe["inputs"] = [{**named(store), **said} for store, said in self.inputs]
        recipe |= dict(sorted(self.values.items()))
        recipe |= {option: named(store) for option, store in self.also.items()}
        return provenance("merge", json.dumps(recipe))
