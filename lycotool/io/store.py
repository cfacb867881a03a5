"""What lycotool reads: tensors by name, from one file or many, loaded only when asked for.

A :class:`TensorStore` is a map from tensor names to places in files. Opening one reads
headers only; :meth:`TensorStore.tensor` reads one tensor with plain ``read`` calls rather
than a memory map, so that a file cut short meanwhile is an error and not a dead process.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from lycotool.errors import BadInputError, ResourceError
from lycotool.io.dtypes import to_torch
from lycotool.io.header import TensorInfo, read_header
from lycotool.io.kernel import copy_range
from lycotool.io.passing import KEPT_BYTES, PassingHash
from lycotool.io.preflight import reason_of
from lycotool.lazy import torch

#: Bytes read or written at once: large enough for disks, small enough for a quick Ctrl-C.
CHUNK_BYTES = 8 * 2**20


class TensorFile(Protocol):
    """One file's tensors; a :class:`SafetensorsFile` or a pickle read into memory."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes."""

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes in pieces."""

    def close(self) -> None:
        """Let go of the file."""


class SafetensorsFile:
    """An open safetensors file.

    Raises
    ------
    BadInputError
        If the header is not valid; see :mod:`lycotool.io.header`.
    """

    def __init__(self, path: Path, *, shown_as: str | None = None) -> None:
        self.path = path
        self._shown_as = shown_as or str(path)
        self._lock = threading.Lock()
        self._kept: memoryview | None = None
        self._passing: PassingHash | None = None
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(error, self._shown_as) from error
        try:
            self._state = self._look()
            self.size = self._state[0]
            header = read_header(self._file, self.size, self._shown_as)
        except OSError as error:
            self._file.close()
            raise unreadable(error, self._shown_as) from error
        except BaseException:
            self._file.close()
            raise
        self.tensors = header.tensors
        self.metadata = header.metadata
        self.data_start = header.data_start

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer``, which has the tensor's size, with its bytes."""
        self._read(name, 0, buffer)

    def read_part(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset`` on."""
        self._read(name, offset, buffer)

    def hash_in_passing(self, *, with_data: bool = False) -> None:
        """Hash what is read from here on, for :meth:`sha256`.

        Parameters
        ----------
        with_data
            Whether :meth:`data_sha256` will be asked for too.
        """
        with reading(self._shown_as):
            self._passing = PassingHash(self._read_at, self.data_start, self.size, with_data=with_data)

    def keep(self) -> None:
        """Read a small file whole, once; what is read of it later, and its hash, come from memory."""
        if self._kept is not None or self.size > KEPT_BYTES:
            return
        kept = memoryview(bytearray(self.size))
        with reading(self._shown_as):
            position = 0
            while position < self.size:
                count = self._read_at(position, kept[position : position + CHUNK_BYTES])
                if not count:
                    break
                position += count
            if position < self.size:
                raise BadInputError("the file changed while it was read", path=self._shown_as)
            self.require_unchanged()
        self._kept = kept

    def sha256(self, look: Callable[[], None] = lambda: None) -> str:
        """SHA-256 of the file; reads what has not passed by.

        Parameters
        ----------
        look
            Called between pieces; may raise to give up.

        Raises
        ------
        BadInputError
            If the file cannot be read, or changed.
        """
        return self._hashes(look)[0]

    def data_sha256(self) -> str:
        """SHA-256 of the data section, as :meth:`sha256`."""
        return self._hashes(lambda: None)[1] or ""

    def _hashes(self, look: Callable[[], None]) -> tuple[str, str | None]:
        if self._passing is None:
            self.hash_in_passing(with_data=True)
        assert self._passing is not None
        with reading(self._shown_as):
            found = self._passing.finish(look)
        self.require_unchanged()
        return found

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes in pieces of at most :data:`CHUNK_BYTES`.

        They take turns in two buffers: each is valid until the next but one is asked for.
        """
        nbytes = self.tensors[name].nbytes
        buffers = [memoryview(bytearray(min(CHUNK_BYTES, nbytes)))]
        if nbytes > CHUNK_BYTES:
            buffers.append(memoryview(bytearray(CHUNK_BYTES)))
        for index, position in enumerate(range(0, nbytes, CHUNK_BYTES)):
            piece = buffers[index % 2][: min(CHUNK_BYTES, nbytes - position)]
            self._read(name, position, piece)
            yield piece

    def _read(self, name: str, offset: int, buffer: memoryview) -> None:
        position, start = 0, self.data_start + self.tensors[name].start + offset
        try:
            while position < len(buffer):
                count = self._read_at(start + position, buffer[position : position + CHUNK_BYTES])
                if not count:
                    raise BadInputError(
                        "the file changed while it was read: the tensor's data is no longer there",
                        path=self._shown_as,
                        key=name,
                    )
                position += count
            self.require_unchanged(name)
            if self._passing is not None:
                self._passing.saw(start, buffer)
        except OSError as error:
            raise unreadable(error, self._shown_as, name) from error

    @property
    def is_read(self) -> bool:
        """Whether its bytes have to pass through this process: for a hash, or because they are here."""
        return self._passing is not None or self._kept is not None

    def copy_to(self, name: str, descriptor: int) -> None:
        """Write the tensor's bytes where another file stands; the system does it where it can.

        Raises
        ------
        OSError
            If the other file cannot be written.
        """
        info = self.tensors[name]
        start = self.data_start + info.start
        copied = (
            0 if self.is_read else copy_range(self._file.fileno(), descriptor, start, start + info.nbytes)
        )
        buffer = memoryview(bytearray(min(CHUNK_BYTES, info.nbytes - copied)))
        while copied < info.nbytes:
            piece = buffer[: info.nbytes - copied]
            self._read(name, copied, piece)
            copied += len(piece)
            while piece:
                piece = piece[os.write(descriptor, piece) :]
        self.require_unchanged(name)

    def copy_data(self, start: int, stop: int, descriptor: int, *, by_system: bool) -> int:
        """Write the file's bytes from ``start`` to ``stop`` where another file stands; gives how many.

        They are the numbers of this file only if :meth:`require_unchanged` passes afterwards.

        Parameters
        ----------
        by_system
            Whether the system copies them, as far as it can; else they pass through memory, all of them.

        Raises
        ------
        BadInputError
            If the file ends before.
        OSError
            If the other file cannot be written.
        """
        if by_system:
            return copy_range(self._file.fileno(), descriptor, start, stop)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, stop - start)))
        for place in range(start, stop, CHUNK_BYTES):
            piece = buffer[: stop - place]
            with reading(self._shown_as):
                count = self._read_at(place, piece)
            if count != len(piece):
                raise BadInputError("the file changed while it was read", path=self._shown_as)
            while piece:
                piece = piece[os.write(descriptor, piece) :]
        return stop - start

    def require_unchanged(self, key: str | None = None) -> None:
        """Demand that nobody wrote to the file since it was opened.

        Raises
        ------
        BadInputError
            If somebody did; with the tensor ``key`` that was read last.
        """
        with reading(self._shown_as):
            if self._look() != self._state:
                raise BadInputError("the file changed while it was read", path=self._shown_as, key=key)

    def read_small(self, names: Sequence[str]) -> list[bytes]:
        """The bytes of tensors of a few bytes each; whether the file changed is looked at once."""
        found: list[bytes] = []
        with reading(self._shown_as):
            for name in names:
                info = self.tensors[name]
                buffer = bytearray(info.nbytes)
                place = self.data_start + info.start
                if self._read_at(place, memoryview(buffer)) != len(buffer):
                    raise BadInputError("the file changed while it was read", path=self._shown_as, key=name)
                if self._passing is not None:
                    self._passing.saw(place, memoryview(buffer))
                found.append(bytes(buffer))
        self.require_unchanged()
        return found

    def _look(self) -> tuple[int, int]:
        """What tells that the file was written to: its size, and when."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _read_at(self, place: int, buffer: memoryview) -> int:
        """Read at a place of the file; several threads may at once."""
        if self._kept is not None:
            found = self._kept[place : place + len(buffer)]
            buffer[: len(found)] = found
            return len(found)
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], place)
        with self._lock:
            self._file.seek(place)
            return self._file.readinto(buffer)

    def close(self) -> None:
        """Close the file; what was read of it is right, whatever the system says now."""
        with contextlib.suppress(OSError):
            self._file.close()


@dataclass(frozen=True, slots=True)
class Stored:
    """The bytes of a tensor as they stand in a file, for a writer who has them copied by the system."""

    file: SafetensorsFile
    name: str

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return self.file.tensors[self.name].nbytes

    def chunks(self) -> Iterator[memoryview]:
        """The bytes themselves, in pieces."""
        return self.file.chunks(self.name)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Errors of the system as errors of an input.

    Raises
    ------
    BadInputError
        With the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(error, path) from error


def unreadable(error: OSError, path: str | Path, key: str | None = None) -> BadInputError:
    """What the system said when it was to read an input."""
    if isinstance(error, PermissionError):
        return BadInputError("permission denied", path=path, key=key)
    return BadInputError(f"cannot be read: {reason_of(error)}", path=path, key=key)


class Entry(NamedTuple):
    """Where one tensor of a store lives."""

    file: TensorFile
    name: str

    @property
    def info(self) -> TensorInfo:
        """The header's entry."""
        return self.file.tensors[self.name]


@dataclass(frozen=True)
class TensorStore:
    """Named tensors from one file, a sharded index, a diffusers folder or a PEFT folder.

    A context manager: leaving it closes the files.

    Attributes
    ----------
    path
        What the user named; ``-`` for standard input.
    kind
        ``"file"``, ``"sharded"``, ``"diffusers"`` or ``"peft"``.
    entries
        Tensor name to place. In a diffusers folder names carry the component's folder
        (``unet.down_blocks…``).
    config
        ``adapter_config.json`` of a PEFT folder, else empty.
    warnings
        What was odd about the files.
    opened
        The files to close.
    """

    path: str
    kind: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    config: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    opened: tuple[TensorFile, ...] = ()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self.opened:
            file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers."""
        return {name: entry.info.shape for name, entry in self.entries.items()}

    @property
    def files(self) -> list[Path]:
        """The files the tensors live in, without repeats."""
        return list(dict.fromkeys(entry.file.path for entry in self.entries.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.info.nbytes for entry in self.entries.values())

    def info(self, name: str) -> TensorInfo:
        """The header's entry for ``name``."""
        file, inside = self.entries[name]
        return file.tensors[inside]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's raw bytes, in pieces."""
        entry = self.entries[name]
        return entry.file.chunks(entry.name)

    def tensor(self, name: str, *, pinned: bool = False) -> torch.Tensor:
        """Read one tensor in its stored dtype, on the CPU; several threads may at once.

        Parameters
        ----------
        pinned
            Whether to read into page-locked memory, from which a GPU copies by itself.
        """
        entry = self.entries[name]
        info = entry.info
        try:
            data = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=pinned)
        except (MemoryError, RuntimeError):
            raise ResourceError(
                f"needs {info.nbytes} bytes of memory at once", path=self.path, key=name
            ) from None
        if info.nbytes:
            entry.file.read_into(entry.name, data.numpy().data)
        return data.view(to_torch(info.dtype)).reshape(info.shape)

    def scalar(self, name: str) -> float:
        """Read a tensor of one element without importing torch.

        Raises
        ------
        BadInputError
            If it has more or fewer elements, or a dtype that is not a plain number.
        """
        entry = self.entries[name]
        info = entry.info
        if info.numel != 1:
            raise BadInputError(
                f"has {info.numel} elements (shape {list(info.shape)}), expected one number",
                path=self.path,
                key=name,
            )
        raw = bytearray(info.nbytes)
        entry.file.read_into(entry.name, memoryview(raw))
        if info.dtype == "BF16":  # the upper half of a float32
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        if info.dtype.startswith("F8"):  # too rare to be worth decoding without torch
            return float(self.tensor(name).float())
        if info.dtype not in _SCALAR_FORMATS:
            raise BadInputError(f"is {info.dtype}, expected a number", path=self.path, key=name)
        return float(struct.unpack(_SCALAR_FORMATS[info.dtype], raw)[0])

    def scalars(self, names: Iterable[str]) -> dict[str, float]:
        """:meth:`scalar` of those that are plain numbers in safetensors files, read together.

        Raises
        ------
        BadInputError
            If a file cannot be read, or changed.
        """
        wanted: dict[SafetensorsFile, list[str]] = {}
        for name in names:
            file, inside = self.entries[name]
            info = file.tensors[inside]
            if isinstance(file, SafetensorsFile) and info.dtype in _SCALAR_FORMATS and info.numel == 1:
                wanted.setdefault(file, []).append(name)
        found: dict[str, float] = {}
        for file, some in wanted.items():
            insides = [self.entries[name].name for name in some]
            formats = [_SCALAR_FORMATS[file.tensors[inside].dtype][1:] for inside in insides]
            raw = b"".join(file.read_small(insides))
            found |= zip(some, map(float, struct.unpack("<" + "".join(formats), raw)), strict=True)
        return found


_SCALAR_FORMATS: Mapping[str, str] = {
    "F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "U8": "<B", "I16": "<h", "U16": "<H",
    "I32": "<i", "U32": "<I", "I64": "<q", "U64": "<Q", "BOOL": "<?",
}  # fmt: skip
