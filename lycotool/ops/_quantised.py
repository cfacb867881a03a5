"""Checkpoints whose float8 weights have scales beside them, read as the numbers they mean.

:func:`dequantised` gives a store in which such a weight is a float32 tensor and its scales are
not there; every command that reads a checkpoint's weights reads them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.errors import IncompatibleError
from lycotool.formats.quantisation import (
    MARKER,
    METADATA,
    Scaled,
    other_quantisation,
    scaled_weights,
)
from lycotool.io.dtypes import FLOATING
from lycotool.io.header import TensorInfo
from lycotool.io.store import Entry, TensorFile, TensorStore
from lycotool.lazy import torch
from lycotool.linalg.quantised import dequantise_, read_into

if TYPE_CHECKING:
    from torch import Tensor


def scaled_in(store: TensorStore) -> dict[str, Scaled]:
    """The scaled float8 weights of a checkpoint, by key."""
    return scaled_weights({key: (entry.info.dtype, entry.info.shape) for key, entry in store.entries.items()})


def scale_keys(scaled: Mapping[str, Scaled], store: TensorStore) -> frozenset[str]:
    """Every tensor that only says how others are stored."""
    keys = {key for weight in scaled.values() for key in (weight.scale, *weight.beside)}
    if scaled:
        keys |= {key for key in store.entries if key.rpartition(".")[2] == MARKER}
    return frozenset(keys)


def dequantised(store: TensorStore, scaled: Mapping[str, Scaled] | None = None) -> TensorStore:
    """The checkpoint with float32 weights in place of scaled float8 ones; others as they are.

    Nothing is read before a tensor is asked for. Weights that cannot be read keep their entry,
    and raise :class:`~lycotool.errors.IncompatibleError` when they are asked for.
    """
    scaled = scaled_in(store) if scaled is None else scaled
    packed = packed_in(store)
    if not scaled and not packed:
        return store
    readable = {key: weight for key, weight in scaled.items() if weight.fault is None}
    gone = scale_keys(scaled, store)
    file, refused = _Dequantised(store, readable), _Refused(store, scaled)
    files: dict[str, TensorFile] = dict.fromkeys([*packed, *scaled], refused)
    files |= dict.fromkeys(readable, file)
    entries = {
        key: Entry(files[key], key) if key in files else entry
        for key, entry in store.entries.items()
        if key not in gone
    }
    metadata = {name: text for name, text in store.metadata.items() if name != METADATA}
    return replace(store, entries=entries, metadata=metadata, opened=())


def packed_in(store: TensorStore) -> list[str]:
    """The integer weights beside which something tells how they are packed."""
    return [
        key
        for key, entry in store.entries.items()
        if key.endswith("weight")
        and entry.info.dtype not in FLOATING
        and other_quantisation(key, store.entries) is not None
    ]


def require_readable(store: TensorStore, scaled: Mapping[str, Scaled], key: str) -> None:
    """Refuse a weight whose values cannot be told from what is stored.

    Raises
    ------
    IncompatibleError
        If it is an integer or packed weight, or its scales are not understood.
    """
    dtype = store.info(key).dtype
    if dtype not in FLOATING:
        kind = other_quantisation(key, store.entries) or "quantised"
        raise IncompatibleError(
            f"is stored as {dtype}; a {kind} weight cannot be changed exactly",
            path=store.path,
            key=key,
            hint="use the fp16, bf16 or fp8 version of this checkpoint",
        )
    if key in scaled and scaled[key].fault is not None:
        raise IncompatibleError(
            f"is a float8 weight that cannot be read: {scaled[key].fault}",
            path=store.path,
            key=key,
            hint="use the fp16 or bf16 version of this checkpoint",
        )


class _Dequantised:
    """The scaled weights of a store as a file of float32 tensors."""

    def __init__(self, store: TensorStore, scaled: Mapping[str, Scaled]) -> None:
        self._store, self._scaled = store, scaled
        self.path = next(iter(store.entries[key].file.path for key in scaled), Path(store.path))
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo("F32", store.info(key).shape, 0, 4 * store.info(key).numel) for key in scaled
        }

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer`` with the weight's values."""
        if not buffer.nbytes:
            return
        weight, stored = self._scaled[name], self._store.tensor(name)
        values = read_into(torch.frombuffer(buffer, dtype=torch.float32).view(stored.shape), stored)
        dequantise_(values, read_scale(self._store, weight), weight.block)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the weight's bytes."""
        buffer = memoryview(bytearray(self.tensors[name].nbytes))
        self.read_into(name, buffer)
        if buffer.nbytes:
            yield buffer

    def close(self) -> None:
        """The store's files are closed by whoever opened it."""


class _Refused:
    """Weights of a store whose values cannot be told: the entries are there, reading them is an error."""

    def __init__(self, store: TensorStore, scaled: Mapping[str, Scaled]) -> None:
        self._store, self._scaled = store, scaled
        self.path = Path(store.path)
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {key: entry.info for key, entry in store.entries.items()}

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Say why not.

        Raises
        ------
        IncompatibleError
            Always.
        """
        require_readable(self._store, self._scaled, name)
        raise AssertionError(f"{name} can be read")

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Say why not."""
        self.read_into(name, memoryview(b""))
        yield memoryview(b"")

    def close(self) -> None:
        """Nothing is open."""


def read_scale(store: TensorStore, weight: Scaled) -> Tensor:
    """A weight's scales as the grid they are, in float32."""
    return store.tensor(weight.scale).float().reshape(weight.grid)
