"""Cache entries on disk: one safetensors file each, named by a hash of all it depends on.

An entry is written whole or not at all, and only served if its name, its own record of that
name and the hash of its data agree, and its numbers are finite. A damaged one is computed again, and noted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

from lycotool.errors import BadInputError, OutputError
from lycotool.io.dtypes import as_bytes, from_torch, to_torch
from lycotool.io.hashes import MODEL_HASH
from lycotool.io.header import read_header
from lycotool.io.writer import FilePlan, TensorPlan, write_file
from lycotool.lazy import torch
from lycotool.linalg.finite import is_finite

#: Part of every key: to be raised when what is stored, or how it is computed, changes.
VERSION = 1

_KEY = "lycotool.cache"


def key_of(*parts: object) -> str:
    """The name of an entry: SHA-256 of the JSON of everything it depends on."""
    text = json.dumps([VERSION, *parts], separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class CacheFolder:
    """A folder of entries.

    Parameters
    ----------
    folder
        Made if it does not exist.

    Attributes
    ----------
    notes
        One sentence for each damaged entry that was met.

    Raises
    ------
    OutputError
        If the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot be made: {(error.strerror or str(error)).lower()}", path=folder
            ) from None

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of an entry, or None if there is none that is sound."""
        path = self.path(key)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(path, (error.strerror or str(error)).lower())
            return None
        try:
            header = read_header(io.BytesIO(raw), len(raw), path)
        except BadInputError as error:
            self._note(path, error.message)
            return None
        data = memoryview(bytearray(raw))[header.data_start :]
        if header.metadata.get(_KEY) != key:
            self._note(path, "it is another entry's")
            return None
        if hashlib.sha256(data).hexdigest() != header.metadata.get(MODEL_HASH):
            self._note(path, "its data is not what was written")
            return None
        tensors = {
            name: torch.frombuffer(data[info.start : info.stop], dtype=to_torch(info.dtype)).reshape(
                info.shape
            )
            for name, info in header.tensors.items()
        }
        if not all(is_finite(tensor) for tensor in tensors.values() if tensor.is_floating_point()):
            self._note(path, "it has NaN or infinite values")
            return None
        return tensors

    def _note(self, path: Path, reason: str) -> None:
        self.notes.append(f"{path}: damaged cache entry, computed again: {reason}")

    def write(self, key: str, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
        """Store an entry.

        Parameters
        ----------
        about
            What a person may want to know of it.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        plans = {
            name: TensorPlan(from_torch(tensor.dtype), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        plan = FilePlan(plans, {**about, _KEY: key}, hashed=True)
        write_file(self.path(key), plan, lambda name: [as_bytes(tensors[name])])
