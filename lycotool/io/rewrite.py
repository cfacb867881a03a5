"""Give a safetensors file another header; its data section is copied as it is, by the system.

The new header never goes over the old one in place: a write of some kilobytes can be cut in two by
a power failure, and half a header makes the whole file unreadable. A new file with the same data
takes the old one's name at the end instead. File systems that can share blocks between files
(Btrfs, XFS, ZFS, bcachefs) then copy nothing but the header: the data keeps its place relative to
their blocks, which is what they ask for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from lycotool.errors import OutputError
from lycotool.io.header import MAX_HEADER_BYTES, read_header
from lycotool.io.store import SafetensorsFile
from lycotool.io.whole import whole_file

#: Blocks that file systems share; the data section keeps its offset in them.
_BLOCK = 4096


def header_with(file: SafetensorsFile, metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON for the file's tensors, where they are, with other metadata.

    Raises
    ------
    OutputError
        If readers would refuse a header of this length.
    """
    document: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in file.tensors.items():
        document[name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.stop],
        }  # fmt: skip
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((file.data_start - 8 - len(text)) % _BLOCK)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(f"the header would have {len(text)} bytes; readers refuse it", path=file.path)
    return struct.pack("<Q", len(text)) + text


def rewrite(file: SafetensorsFile, header: bytes, target: Path) -> None:
    """Write the file with a header from :func:`header_with` to ``target``, which may be itself.

    Raises
    ------
    BadInputError
        If the file changed since it was opened.
    OutputError
        If the disk is full or any write fails. The target is then as it was before.
    """
    data = file.size - file.data_start

    def check(written: BinaryIO) -> None:
        size = os.fstat(written.fileno()).st_size
        written.seek(0)
        found = read_header(written, size, target)
        if dict(found.tensors) != dict(file.tensors) or size != len(header) + data:
            raise OutputError("the written file does not read back as planned", path=target)

    with whole_file(target, len(header) + data, check=check) as written:
        written.write(header)
        written.flush()
        _copy(file, written.fileno())
        file.require_unchanged()


def _copy(file: SafetensorsFile, descriptor: int) -> None:
    """Append the file's data section; from the first whole block on without reading it."""
    stop = file.size
    position = min(stop, file.data_start + -file.data_start % _BLOCK)
    file.copy_data(file.data_start, position, descriptor, by_system=False)
    position += file.copy_data(position, stop, descriptor, by_system=True)
    file.copy_data(position, stop, descriptor, by_system=False)
