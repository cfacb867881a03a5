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
import json
import os
import secrets
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lycotool.errors import OutputError
from lycotool.io.hashes import PLACEHOLDERS, DataHasher
from lycotool.io.header import DTYPE_BITS, MAX_HEADER_BYTES, read_header

#: Beginning of a temporary file's name, so that litter after a power cut is recognisable.
TEMPORARY_PREFIX = ".lycotool-"


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
    is written and take their place in the metadata.
    """

    tensors: Mapping[str, TensorPlan]
    metadata: Mapping[str, str]
    hashed: bool = False

    def __post_init__(self) -> None:
        place = {dtype: -index for index, dtype in enumerate(DTYPE_BITS)}
        ordered = sorted(self.tensors.items(), key=lambda item: (place[item[1].dtype], item[0]))
        object.__setattr__(self, "tensors", dict(ordered))

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + sum(plan.nbytes for plan in self.tensors.values())

    def header(self, hashes: Mapping[str, str] = PLACEHOLDERS) -> bytes:
        """Length prefix and JSON, with these values for the two hashes."""
        return self._encode({**self.metadata, **(hashes if self.hashed else {})})

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


#: Pieces at least this long are hashed by another thread while they are written.
_HASHED_ASIDE = 2**15

#: Bytes after which the disk is put to work.
_FLUSH_BYTES = 64 * 2**20

#: Gives a tensor's bytes when the writer reaches it.
Producer = Callable[[str], Iterable[memoryview]]


def prepare_output(path: str, *, inputs: Iterable[Path], force: bool) -> Path | None:
    """Check that ``path`` can be written, before any work is done.

    Returns
    -------
    Path or None
        The resolved target (so that a symlink stays a link); ``None`` for standard output.

    Raises
    ------
    OutputError
        With what stands in the way: exists, is an input, no folder, no permission, not a
        regular file.
    """
    if path == "-":
        if sys.stdout.isatty():
            raise OutputError("refusing to write a binary file to a terminal", path="-",
                              hint="redirect standard output, or name a file with `-o`")  # fmt: skip
        return None
    target = Path(path)
    resolved = Path(os.path.realpath(target))
    try:
        if target.is_symlink() and not target.exists():
            raise OutputError("is a symlink that leads nowhere", path=path)
        found = resolved.stat()
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise OutputError(_reason(error), path=path) from None
    if found is not None:
        _check_replaceable(resolved, found, path, inputs=inputs, force=force)
    folder = resolved.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", path=path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in the folder {folder}", path=path)
    if len(os.fsencode(resolved.name)) > _name_limit(folder):
        raise OutputError("the file name is too long", path=path)
    return resolved


def _check_replaceable(
    resolved: Path, found: os.stat_result, path: str, *, inputs: Iterable[Path], force: bool
) -> None:
    for source in inputs:
        if os.path.samestat(found, source.stat()):
            raise OutputError(
                f"is the same file as the input {source}", path=path, hint="choose another name with `-o`"
            )
    if stat.S_ISDIR(found.st_mode):
        raise OutputError("is a directory", path=path)
    if not stat.S_ISREG(found.st_mode):
        raise OutputError("is not a regular file", path=path)
    if not force:
        raise OutputError("exists already", path=path, hint="use `--force` to replace it, or choose a name with `-o`")  # fmt: skip
    if not found.st_mode & 0o222 or not os.access(resolved, os.W_OK):
        raise OutputError("is read-only", path=path)


def _name_limit(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return 255


def write_file(
    target: Path | None,
    plan: FilePlan,
    produce: Producer,
    *,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write ``plan`` to ``target``, or to standard output when it is ``None``.

    Parameters
    ----------
    produce
        Called once per tensor in file order; must yield exactly the planned bytes.
    advance
        Told the number of bytes after each piece, for a progress bar.

    Raises
    ------
    OutputError
        If the disk is full or any write fails. The target is then as it was before.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="lycotool-stdout-") as folder:
            spooled = Path(folder) / "stdout.safetensors"
            write_file(spooled, plan, produce, advance=advance)
            with spooled.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    _check_space(target, plan.nbytes)
    try:
        with _nameless_file(target) as (descriptor, publish):
            _fill(descriptor, plan, produce, advance)
            os.fsync(descriptor)
            _read_back(descriptor, plan, target)
            publish(_mode_for(target))
    except OSError as error:
        raise OutputError(_reason(error), path=target) from error


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(f"no space: need {needed} bytes, {free} are free", path=target)


def _fill(descriptor: int, plan: FilePlan, produce: Producer, advance: Callable[[int], None]) -> None:
    total = plan.nbytes
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, total)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
    _write_all(descriptor, memoryview(plan.header()))
    hasher = DataHasher(plan.legacy_header()) if plan.hashed else None
    unflushed = 0
    with ThreadPoolExecutor(1, "lycotool-hash") as pool:
        for name, tensor in plan.tensors.items():
            written = 0
            for piece in produce(name):
                # The piece's memory may be used again once it is asked for the next.
                hashed = None
                if hasher is not None and len(piece) >= _HASHED_ASIDE:
                    hashed = pool.submit(hasher.update, piece)
                elif hasher is not None:
                    hasher.update(piece)
                _write_all(descriptor, piece)
                if hashed is not None:
                    hashed.result()
                written += len(piece)
                unflushed += len(piece)
                if unflushed >= _FLUSH_BYTES:
                    _start_flush(descriptor)
                    unflushed = 0
                advance(len(piece))
            if written != tensor.nbytes:
                raise AssertionError(f"{name}: produced {written} of {tensor.nbytes} bytes")
    if hasher is not None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write_all(descriptor, memoryview(plan.header(hasher.metadata())))


def _start_flush(descriptor: int) -> None:
    """Have the system begin to write what it has, so that the last flush finds little left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


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


def _mode_for(target: Path) -> int:
    """The old file's permissions, or those any new file gets."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


@contextlib.contextmanager
def _nameless_file(target: Path) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Open a file nobody sees; ``publish(mode)`` gives it the target's name.

    Without ``publish`` nothing remains: an ``O_TMPFILE`` vanishes with its descriptor, a
    named temporary file is removed.
    """
    temporary = target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"
    descriptor = _open_tmpfile(target.parent)
    named = descriptor is None
    if descriptor is None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o600)
    is_open = True

    def publish(mode: int) -> None:
        nonlocal named, is_open
        if not named:
            _link_descriptor(descriptor, temporary)
            named = True
        is_open = False  # whatever close says, the descriptor is gone
        os.close(descriptor)  # before the rename: Windows refuses to replace an open file
        temporary.chmod(mode)
        temporary.replace(target)
        named = False
        _fsync_folder(target.parent)

    try:
        yield descriptor, publish
    finally:
        try:
            if is_open:
                os.close(descriptor)
        finally:
            if named:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()


def _open_tmpfile(folder: Path) -> int | None:
    """A file without a name in ``folder``, or None where the platform has none."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return None
        raise


def _link_descriptor(descriptor: int, name: Path) -> None:
    # Without a directory descriptor CPython calls link(2), which links the /proc symlink
    # itself and fails across file systems; with one it calls linkat with AT_SYMLINK_FOLLOW.
    root = os.open("/", os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=root, follow_symlinks=True)
    finally:
        os.close(root)


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (os.strerror(error.errno) if error.errno else str(error)).lower()
