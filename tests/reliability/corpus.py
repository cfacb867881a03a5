"""Inputs of the guided fuzzer that are kept, because each of them reaches code that the others do not.

One archive for each target, in ``corpus/``; every test run tries them all, and the guided fuzzer starts
from them. ``python -m tests.reliability.guided TARGET --keep FOLDER`` makes one of what a run found.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"

#: Bytes of an archive: nine of them are in the repository.
_MOST = 100_000

#: The earliest time an archive can have, so that the same inputs are the same file.
_TIME = (1980, 1, 1, 0, 0, 0)


def kept(name: str) -> list[bytes]:
    """The inputs of a target."""
    path = FOLDER / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(member) for member in archive.infolist()]


def keep(name: str, inputs: Iterable[bytes]) -> tuple[int, int]:
    """Keep the inputs of a target, the shortest first, as many as an archive takes; how many, of how many."""
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    low, high = 0, len(ordered)
    while low < high:  # the most whose archive is not too large
        middle = (low + high + 1) // 2
        if len(_archive(ordered[:middle])) <= _MOST:
            low = middle
        else:
            high = middle - 1
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.zip").write_bytes(_archive(ordered[:low]))
    return low, len(ordered)


def _archive(inputs: Iterable[bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number, data in enumerate(inputs):
            archive.writestr(zipfile.ZipInfo(f"{number:04d}", _TIME), data, zipfile.ZIP_DEFLATED)
    return file.getvalue()
