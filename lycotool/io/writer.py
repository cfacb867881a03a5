"""Write safetensors files: streamed, deterministic, whole or not at all.

The steps, each of which a caller may rely on:

1. before any tensor is read, :func:`prepare_output` checks that the target can be written;
2. the header is written first (its size is known from the plan), then the tensors as they
   come, in the library's own order: by dtype, larger elements first, then by name;
3. the data goes to a file without a name (``O_TMPFILE``) or, where that does not exist, to
   a hidden temporary file in the same folder; space is reserved at once;
4. the file is flushed to disk, its header read back, and only then takes the target's name;
5. whatever fails, the target is as it was before and no temporary file is left.

Same tensors and metadata give the same bytes: metadata keys are sorted, which the reference
writer does not promise (its order changes from run to run).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lycotool.errors import OutputError
from lycotool.io.hashes import PLACEHOLDERS, SPEC_HASH, DataHasher
from lycotool.io.header import DTYPE_BITS, MAX_HEADER_BYTES, read_header
from lycotool.io.nameless import NamelessFile, nameless_file
from lycotool.io.preflight import check_space as check_space
from lycotool.io.preflight import prepare_output as prepare_output
from lycotool.io.preflight import reason_of
from lycotool.io.store import CHUNK_BYTES, Stored


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """dtype (safetensors name) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor will take."""
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class FilePlan:
    """A whole file before its data: tensors in file order and metadata.

    With ``hashed``, ``sshs_model_hash`` and ``sshs_legacy_hash`` are computed while the data
    is written and take their place in the metadata; with ``spec_hashed`` so does
    ``modelspec.hash_sha256``. The tensors in ``last`` are asked for after all others, because
    only then are they known; their place in the file is the same. ``settle`` gives metadata that
    are known only when the data has been written; what stands for them until then is as long.
    """

    tensors: Mapping[str, TensorPlan]
    metadata: Mapping[str, str]
    hashed: bool = False
    spec_hashed: bool = False
    last: frozenset[str] = frozenset()
    settle: Callable[[], Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        place = {dtype: -index for index, dtype in enumerate(DTYPE_BITS)}
        ordered = sorted(self.tensors.items(), key=lambda item: (place[item[1].dtype], item[0]))
        object.__setattr__(self, "tensors", dict(ordered))

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + sum(plan.nbytes for plan in self.tensors.values())

    def header(
        self, hashes: Mapping[str, str] = PLACEHOLDERS, settled: Mapping[str, str] | None = None
    ) -> bytes:
        """Length prefix and JSON, with these values for the hashes and for what was settled."""
        kept = {k: v for k, v in hashes.items() if (self.spec_hashed if k == SPEC_HASH else self.hashed)}
        return self._encode({**self.metadata, **kept, **(settled or {})})

    def in_turn(self, start: int = 0) -> Iterator[tuple[str, int | None]]:
        """The tensors as they are asked for, and their place in the file unless it is the next.

        Parameters
        ----------
        start
            Where the data begins.
        """
        position = start
        places: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            places[name] = start
            start += tensor.nbytes
        for name in sorted(self.tensors, key=self.last.__contains__):
            yield name, None if places[name] == position else places[name]
            position = places[name] + self.tensors[name].nbytes

    def legacy_header(self) -> bytes:
        """The header ``sshs_legacy_hash`` is defined on: ``ss_*`` metadata alone."""
        return self._encode({k: v for k, v in self.metadata.items() if k.startswith("ss_")}, always=True)

    def _encode(self, metadata: Mapping[str, str], *, always: bool = False) -> bytes:
        """The header; ``always`` writes the metadata even when it is empty, as an empty dict does."""
        document: dict[str, object] = {}
        if metadata or always:
            document["__metadata__"] = dict(sorted(metadata.items()))
        position = 0
        for name, plan in self.tensors.items():
            stop = position + plan.nbytes
            document[name] = {
                "dtype": plan.dtype,
                "shape": list(plan.shape),
                "data_offsets": [position, stop],
            }
            position = stop
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise OutputError(f"the header would have {len(text)} bytes; readers refuse it")
        return struct.pack("<Q", len(text)) + text


#: Pieces at least this long are hashed and written by other threads while the next is made.
_ASIDE = 2**15

#: Bytes after which the disk is put to work.
_FLUSH_BYTES = 64 * 2**20

#: Gives a tensor's bytes when the writer reaches it; each piece stays as it is until the next
#: but one is asked for. What stands in a file already may be named instead.
Producer = Callable[[str], Iterable[memoryview | Stored]]


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is complete on disk and has no name yet.

    Attributes
    ----------
    path
        Where it can be read meanwhile.
    plan
        What is in it.
    digests
        SHA-256 of every tensor's bytes as they were produced.
    """

    path: Path
    plan: FilePlan
    digests: Mapping[str, bytes]


#: Looks at a finished file before it gets its name; what it raises keeps the name from it.
Check = Callable[[Written], None]


def write_file(
    target: Path | None,
    plan: FilePlan,
    produce: Producer,
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
    check: Check | None = None,
    flushed: bool = True,
) -> None:
    """Write ``plan`` to ``target``, or to standard output when it is ``None``.

    Parameters
    ----------
    produce
        Called once per tensor in file order; must yield exactly the planned bytes. A piece is
        still hashed and written while the next one is made.
    advance
        Told the number of bytes after each piece, for a progress bar.
    check
        Given the finished file before it gets its name.
    flushed
        Whether the name is to be on disk too when this returns.

    Raises
    ------
    OutputError
        If the disk is full or any write fails. The target is then as it was before.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="lycotool-stdout-") as folder:
            spooled = Path(folder) / "stdout.safetensors"
            write_file(spooled, plan, produce, advance=advance, check=check)
            with spooled.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    check_space(target, plan.nbytes)
    with staged_file(target, plan, produce, advance=advance, check=check) as file, _as_output(target):
        file.publish(flushed=flushed)


@contextlib.contextmanager
def staged_file(
    target: Path,
    plan: FilePlan,
    produce: Producer,
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
    check: Check | None = None,
) -> Iterator[NamelessFile]:
    """Write a file that gets its name when :meth:`NamelessFile.publish` is called, or vanishes.

    Raises
    ------
    OutputError
        If a write fails.
    """
    with contextlib.ExitStack() as stack:
        with _as_output(target):
            file = stack.enter_context(nameless_file(target))
            digests = _fill(file.descriptor, plan, produce, advance, digested=check is not None)
            os.fsync(file.descriptor)
            _read_back(file.descriptor, plan, target)
        if check is not None:
            check(Written(file.path, plan, digests))
        try:
            yield file
        finally:
            with _as_output(target):
                stack.close()


@contextlib.contextmanager
def _as_output(target: Path) -> Iterator[None]:
    """Errors of the system as errors of the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(reason_of(error), path=target) from error


def _fill(
    descriptor: int,
    plan: FilePlan,
    produce: Producer,
    advance: Callable[[int], None],
    *,
    digested: bool,
) -> dict[str, bytes]:
    """Write header and data; give the digests of the tensors when they are wanted."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, plan.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
    header = plan.header()
    _write_all(descriptor, memoryview(header))
    is_hashed = plan.hashed or plan.spec_hashed
    running = DataHasher(plan.legacy_header()) if is_hashed and not plan.last else None
    digests: dict[str, bytes] = {}
    flusher = _Flusher(descriptor)
    waiting: list[Future[None]] = []

    def store(piece: memoryview | Stored) -> None:
        if isinstance(piece, Stored):
            piece.file.copy_to(piece.name, descriptor)
        else:
            _write_all(descriptor, piece)
        flusher.wrote(piece.nbytes)

    with (
        ThreadPoolExecutor(1, "lycotool-hash") as hashing,
        ThreadPoolExecutor(1, "lycotool-write") as writing,
    ):
        for name, place in plan.in_turn(len(header)):
            if place is not None:
                _finish(waiting)
                os.lseek(descriptor, place, os.SEEK_SET)
            digest = hashlib.sha256() if digested else None
            sinks = [sink.update for sink in (running, digest) if sink is not None]
            written = 0
            for piece in _pieces(produce(name), in_memory=bool(sinks)):
                # The memory of the piece before is used again for the one after this.
                _finish(waiting)
                waiting = []
                if not isinstance(piece, Stored):
                    for sink in sinks:
                        if len(piece) >= _ASIDE:
                            waiting.append(hashing.submit(sink, piece))
                        else:
                            sink(piece)
                if piece.nbytes >= _ASIDE:
                    waiting.append(writing.submit(store, piece))
                else:
                    store(piece)
                written += piece.nbytes
                advance(piece.nbytes)
            if written != plan.tensors[name].nbytes:
                raise AssertionError(f"{name}: produced {written} of {plan.tensors[name].nbytes} bytes")
            if digest is not None:
                _finish(waiting)
                digests[name] = digest.digest()
        _finish(waiting)
    if is_hashed or plan.settle is not None:
        hashes: Mapping[str, str] = {}
        if is_hashed:
            hashes = (running or _hashed_again(descriptor, plan, len(header))).metadata()
        final = plan.header(hashes, None if plan.settle is None else plan.settle())
        if len(final) != len(header):
            raise AssertionError(f"the header has {len(final)} bytes where {len(header)} were left for it")
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write_all(descriptor, memoryview(final))
    return digests


def _pieces(produced: Iterable[memoryview | Stored], *, in_memory: bool) -> Iterator[memoryview | Stored]:
    """What was produced; with ``in_memory`` the bytes of what was only named, which are hashed."""
    for piece in produced:
        if in_memory and isinstance(piece, Stored):
            yield from piece.chunks()
        else:
            yield piece


def _finish(waiting: Iterable[Future[None]]) -> None:
    for future in waiting:
        future.result()


def _hashed_again(descriptor: int, plan: FilePlan, start: int) -> DataHasher:
    """The hashes of data that was not written in its order."""
    hasher = DataHasher(plan.legacy_header())
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(start)
        while piece := file.read(CHUNK_BYTES):
            hasher.update(memoryview(piece))
    return hasher


class _Flusher:
    """Has the system begin to write what it has, so that the last flush finds little left."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unflushed = 0

    def wrote(self, nbytes: int) -> None:
        """So many bytes more are to be flushed."""
        self._unflushed += nbytes
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, data: memoryview) -> None:
    position = 0
    while position < len(data):
        position += os.write(descriptor, data[position : position + 2**24])


def _read_back(descriptor: int, plan: FilePlan, target: Path) -> None:
    """Parse what was written as a reader would, and compare with the plan."""
    size = os.fstat(descriptor).st_size
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        header = read_header(file, size, target)
    written = {name: TensorPlan(info.dtype, info.shape) for name, info in header.tensors.items()}
    if written != dict(plan.tensors):
        raise OutputError("the written file does not read back as planned", path=target)
