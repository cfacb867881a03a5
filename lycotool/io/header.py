"""The safetensors header: parsed strictly, without torch, before any tensor is read.

Format: ``u64 little-endian n``, ``n`` bytes of JSON, then the data section. The JSON maps
each tensor name to ``{"dtype", "shape", "data_offsets"}`` and ``__metadata__`` to a map of
strings. Source: the README of https://github.com/huggingface/safetensors.

Stricter than the reference parser where that accepts files it cannot mean: duplicate names
(JSON keeps the last one), absurd numbers of tensors or dimensions, shapes whose product of
non-zero sizes overflows.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import string
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from lycotool.errors import BadInputError

#: Size in bits of one element, by safetensors dtype name, in the reference's order: its
#: files hold the tensors of the last dtype first.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8,
    "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
}  # fmt: skip

#: Limits that no real file comes near; the reference parser shares the first.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**63


class TensorInfo(NamedTuple):
    """What the header says of one tensor; ``start`` and ``stop`` count from the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors in file order, metadata, and where the data begins."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


class Columns(NamedTuple):
    """The tensors of a header in the file's order, one tuple for each of their properties."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[list[int], ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]


class SplitHeader(NamedTuple):
    """A header whose tensors are not parsed yet.

    ``text`` is the JSON without metadata, which is the same in many files of one network.
    """

    text: str
    metadata: Mapping[str, str]
    data_start: int
    data_bytes: int

    def tensors(self) -> dict[str, TensorInfo] | None:
        """The tensors in the file's order; None where something may be wrong with them."""
        remember = _tensors_of if len(self.text) <= _REMEMBERED else _tensors_of.__wrapped__
        return remember(self.text, self.data_bytes)

    def columns(self) -> Columns | None:
        """As :meth:`tensors`, in less time and without their places."""
        return _columns_of(self.text, self.data_bytes)


def read_header(file: BinaryIO, size: int, path: str | Path) -> Header:
    """Parse and validate the header of an open safetensors file of ``size`` bytes.

    Raises
    ------
    BadInputError
        Whatever is wrong with the container, named with the tensor and the numbers.
    """
    raw = _read_raw(file, size, path)
    start = 8 + len(raw)
    split = _split(raw, size - start, path)
    if split is not None and (plain := split.tensors()) is not None:
        return Header(plain, split.metadata, start)
    entries = _parse_json(raw, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_TENSORS:
        raise BadInputError(f"too many tensors: {len(entries)}, the limit is {MAX_TENSORS}", path=path)
    found = {name: _tensor(name, entry, path) for name, entry in entries.items()}
    tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop, item[0])))
    _check_coverage(tensors, size - start, path)
    return Header(tensors, metadata, start)


def read_split_header(file: BinaryIO, size: int, path: str | Path) -> SplitHeader | None:
    """As :func:`read_header`, but parse the metadata alone; None where that takes a closer look.

    Raises
    ------
    BadInputError
        If there is no header.
    """
    raw = _read_raw(file, size, path)
    return _split(raw, size - 8 - len(raw), path)


def _read_raw(file: BinaryIO, size: int, path: str | Path) -> bytes:
    """The bytes of the header.

    Raises
    ------
    BadInputError
        If the file is none of this format, or cut short.
    """
    if size == 0:
        raise BadInputError("empty file (0 bytes)", path=path)
    start = file.read(min(size, 512))
    if size < 8:
        raise BadInputError(
            f"too short for a safetensors file ({size} bytes)", path=path, hint=_look_alike(start)
        )
    (length,) = struct.unpack("<Q", start[:8])
    if (hint := _look_alike(start)) is not None and length + 8 > size:
        raise BadInputError(f"not a safetensors file: {hint}", path=path)
    if length == 0:
        raise BadInputError("header length 0", path=path)
    if length > MAX_HEADER_BYTES:
        raise BadInputError(
            f"header says it is {length} bytes long; the limit is {MAX_HEADER_BYTES}", path=path
        )
    if 8 + length > size:
        raise BadInputError(
            f"truncated: header says it is {length} bytes long, expected at least "
            f"{8 + length} bytes, found {size}",
            path=path,
            hint="download or copy the file again",
        )
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise BadInputError("the file changed while it was read", path=path)
    # A quick look first: a million entries take seconds to parse.
    if length > MAX_TENSORS and (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise BadInputError(f"too many tensors: {count}, the limit is {MAX_TENSORS}", path=path)
    return raw


_PRINTED = frozenset(string.printable.encode())


def _look_alike(start: bytes) -> str | None:
    """Say what a file that is not safetensors probably is."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is an HTML page, probably a log-in or error page saved in its place"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer; fetch the real file with `git lfs pull`"
    if start.startswith(b"PK\x03\x04"):
        return "this is a PyTorch (zip) checkpoint or another zip archive"
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05":
        return "this is a PyTorch pickle"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file"
    if all(byte in _PRINTED for byte in start[:64]):  # a length has bytes of 0
        return "this is a text file"
    return None


def _parse_json(raw: bytes, path: str | Path) -> dict[str, object]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"the header is not UTF-8 (byte {error.start})", path=path) from None

    try:
        entries = json.loads(text, object_pairs_hook=_without_repeats)
    except _RepeatedNameError as error:
        raise BadInputError(f"duplicate name in the header: {error}", path=path) from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the header is not valid JSON: {error}", path=path) from None
    if not isinstance(entries, dict):
        raise BadInputError("the header's JSON is not an object", path=path)
    return entries


class _RepeatedNameError(Exception):
    """A name that a JSON object has twice."""


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedNameError(next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1))
    return found


_METADATA_FIRST = '{"__metadata__":'
_metadata_decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _split(raw: bytes, data_bytes: int, path: str | Path) -> SplitHeader | None:
    """Metadata, and the text of the tensors; None where something may be wrong with them.

    Metadata stands first in the files of every known writer.
    """
    metadata: object = {}
    try:
        text = raw.decode("utf-8")
        if text.startswith(_METADATA_FIRST):
            metadata, end = _metadata_decoder.raw_decode(text, len(_METADATA_FIRST))
            if text.startswith(',"', end):
                end += 1
            elif not text.startswith("}", end):
                return None
            text = "{" + text[end:]
        return SplitHeader(text, _metadata(metadata, path), 8 + len(raw), data_bytes)
    except (ValueError, RecursionError, _RepeatedNameError, BadInputError):
        return None


#: Characters of the longest header that is remembered.
_REMEMBERED = 2**19


@lru_cache(maxsize=8)
def _tensors_of(text: str, data_bytes: int) -> dict[str, TensorInfo] | None:
    """The tensors of a header without metadata and without fault; None where there may be one."""
    columns = _columns_of(text, data_bytes)
    if columns is None:
        return None
    names, dtypes, shapes, starts, stops = columns
    rows = zip(dtypes, map(tuple, shapes), starts, stops, strict=True)
    return dict(zip(names, map(_new_info, itertools.repeat(TensorInfo), rows), strict=False))


def _columns_of(text: str, data_bytes: int) -> Columns | None:
    """:func:`_tensors_of`, not yet put together."""
    if "\\" in text:
        return None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict) or "__metadata__" in entries or len(entries) > MAX_TENSORS:
        return None
    # Without a backslash, quotes only stand around strings. A name that comes twice, and what
    # it loses, are strings beyond the five of every entry: its name, the fields' and the dtype.
    if text.count('"') != 10 * len(entries):
        return None
    return _plain_columns(entries, data_bytes)


def _metadata(value: object, path: str | Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadInputError("__metadata__ is not an object", path=path)
    for key, text in value.items():
        if not isinstance(text, str):
            raise BadInputError(
                f"metadata value of {key!r} is {type(text).__name__}, expected a string", path=path
            )
    try:
        "".join([*value, *value.values()]).encode()
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"the metadata is not valid Unicode: it has half of a surrogate pair, {error.object[error.start]!r}",
            path=path,
        ) from None
    return value


#: dtypes of whole bytes, and how many.
_DTYPE_BYTES = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0}

_fields_of = operator.itemgetter("dtype", "shape", "data_offsets")

#: What ``TensorInfo(…)`` comes to in the end.
_new_info = tuple.__new__


def _plain_columns(entries: Mapping[str, Any], data_bytes: int) -> Columns | None:
    """The tensors of a header without fault; None where there may be one.

    Every entry that passes here passes :func:`_tensor` and :func:`_check_coverage` too. Column by
    column it is ten times as fast, and a folder has a million entries.
    """
    if not entries:
        return Columns((), (), (), (), ()) if data_bytes == 0 else None
    infos = entries.values()
    try:
        "".join(entries).encode()
        if {*map(type, infos)} != {dict} or {*map(len, infos)} != {3}:
            return None
        dtypes, shapes, offsets = zip(*map(_fields_of, infos), strict=True)
        if {*map(type, shapes), *map(type, offsets)} != {list} or {*map(len, offsets)} != {2}:
            return None
        starts, stops = zip(*offsets, strict=True)
        sizes = list(itertools.chain.from_iterable(shapes))
        if not {*map(type, sizes), *map(type, starts), *map(type, stops)} <= {int}:
            return None
        nbytes = map(operator.mul, map(math.prod, shapes), map(_DTYPE_BYTES.__getitem__, dtypes))
        if (
            max(map(len, shapes)) > MAX_DIMENSIONS
            or min(sizes, default=1) < 1
            or stops != tuple(itertools.accumulate(nbytes))
            or starts != (0, *stops[:-1])
            or stops[-1] != data_bytes
        ):
            return None
    except (KeyError, TypeError, ValueError):  # the slow way says what is wrong, and with which tensor
        return None
    return Columns(tuple(entries), dtypes, shapes, starts, stops)


def _tensor(name: str, entry: object, path: str | Path) -> TensorInfo:
    def bad(reason: str) -> BadInputError:
        return BadInputError(reason, path=path, key=name)

    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInputError(f"tensor name {name!r} is not valid Unicode", path=path) from None
    if name == "__metadata__" or not isinstance(entry, dict):
        raise bad("the header entry is not an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"unknown dtype {dtype!r}, expected one of {' '.join(sorted(DTYPE_BITS))}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _is_sizes(shape):
        raise bad(f"shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r} are not two increasing offsets")
    if len(shape) > MAX_DIMENSIONS:
        raise bad(f"{len(shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    if _product(tuple(size for size in shape if size)) >= _MAX_ELEMENTS:
        raise bad(f"shape {shape} overflows")
    bits = _product(tuple(shape)) * DTYPE_BITS[dtype]
    if bits % 8:
        raise bad(f"{dtype} tensor of shape {shape} does not fill whole bytes")
    start, stop = offsets
    if bits // 8 != stop - start:
        raise bad(f"{dtype} of shape {shape} needs {bits // 8} bytes, the header gives it {stop - start}")
    return TensorInfo(dtype, tuple(shape), start, stop)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < _MAX_ELEMENTS for v in value)


def _check_coverage(tensors: Mapping[str, TensorInfo], data_bytes: int, path: str | Path) -> None:
    position = 0
    for name, info in tensors.items():
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise BadInputError(
                f"starts at byte {info.start} of the data, expected {position}: it {fault}",
                path=path,
                key=name,
            )
        position = info.stop
        if position > data_bytes:
            raise BadInputError(
                f"truncated: {name} ends at byte {position} of the data; "
                f"expected {position} bytes or more, found {data_bytes}",
                path=path,
                hint="download or copy the file again",
            )
    if position != data_bytes:
        raise BadInputError(
            f"{data_bytes - position} bytes after the last tensor "
            f"(expected {position} bytes of data, found {data_bytes})"
            if data_bytes - position != 1
            else "1 byte after the last tensor",
            path=path,
        )


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
