"""`--verify`: read what was written, and compare it with what the inputs say, before it has a name.

Three things are compared for every tensor: the bytes on disk with the bytes that were
computed, what was copied with its source, and what was changed with ``W + Σ s·ΔW`` computed
anew from the files in float64. Merge methods choose elements by size and sign, so theirs is
computed anew in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lycotool.errors import CheckError
from lycotool.io.store import Entry, SafetensorsFile, TensorStore
from lycotool.io.writer import Written
from lycotool.lazy import torch
from lycotool.linalg.finite import extremes
from lycotool.linalg.quantised import dequantise_
from lycotool.ops._bake_tensors import Source
from lycotool.ops._common import Progress, listed

if TYPE_CHECKING:
    from torch import Tensor

#: Operations in float32 on the way to an element, of which each rounds by half an eps of the
#: largest value it meets: sums over a rank or a block, and a few products.
OPERATIONS = 256

#: Elements compared at a time.
_PIECE = 2**22


@dataclass(frozen=True, slots=True)
class Verification:
    """What `--verify` found: tensors copied and changed, and the errors of the changed ones.

    The errors are against ``W + Σ s·ΔW`` in float64, so they include the rounding to the
    saved dtype.
    """

    copied: int
    changed: int
    max_error: float
    mean_error: float


@dataclass
class Verifier:
    """Compares files as they are finished; :meth:`result` when all are.

    Parameters
    ----------
    scales
        New scales by key, for a weight whose scale is in another file.
    """

    source: Source
    device: torch.device
    scales: Mapping[str, Tensor]
    progress: Progress
    _faults: list[str] = field(default_factory=list)
    _copied: int = 0
    _changed: int = 0
    _max: float = 0.0
    _sum: float = 0.0
    _count: int = 0

    def check(self, written: Written, keys: Mapping[str, str]) -> None:
        """Compare one file.

        Parameters
        ----------
        keys
            Name in the file to the checkpoint's key.

        Raises
        ------
        CheckError
            If a tensor is not what it must be; every one is named.
        """
        file = SafetensorsFile(written.path)
        try:
            for name, key in keys.items():
                fault = self._fault(file, name, key, written.digests[name])
                if fault is not None:
                    self._faults.append(f"{key}: {fault}")
                self.progress.advance(file.tensors[name].nbytes)
        finally:
            file.close()
        if self._faults:
            raise CheckError(
                f"verification failed for {len(self._faults)} tensors; nothing was written",
                details=listed(self._faults),
                hint="a disk or memory fault, or a bug: try again, and report it if it stays",
            )

    def result(self) -> Verification:
        """What was compared."""
        mean = self._sum / self._count if self._count else 0.0
        return Verification(self._copied, self._changed, self._max, mean)

    def _fault(self, file: SafetensorsFile, name: str, key: str, digest: bytes) -> str | None:
        if _digest(file.chunks(name)) != digest:
            return "the bytes on disk are not those that were computed"
        if self.source.is_copied(key):
            self._copied += 1
            if _digest(self.source.store.chunks(key)) != digest:
                return "is not a copy of the checkpoint's"
            return None
        if key in self.source.changed_scales:
            return None  # compared with its weight
        self._changed += 1
        return self._error(file, name, key)

    def _error(self, file: SafetensorsFile, name: str, key: str) -> str | None:
        """Compare a changed or cast tensor with its value in float64."""
        stored = _read(file, name)
        if not stored.is_floating_point() or stored.numel() == 0:
            return None
        exact = self.source.compute(key, self.device, torch.float64)
        largest = max(_peak(exact), _peak(self.source.numbers.tensor(key)))
        step = 1.0
        values = stored.to(exact)
        if key in self.source.scaled:
            scaled = self.source.scaled[key]
            scale = self._scale(file, scaled.scale).double().reshape(scaled.grid)
            dequantise_(values, scale, scaled.block)
            step = float(scale.max())
        info = torch.finfo(stored.dtype)
        floor = step * info.smallest_normal * info.eps / 2
        floor += OPERATIONS * torch.finfo(torch.float32).eps / 2 * largest
        beyond, worst = 0, 0.0
        pieces = zip(
            torch.split(values.view(-1), _PIECE), torch.split(exact.reshape(-1), _PIECE), strict=True
        )
        for found, meant in pieces:
            error = found.sub_(meant).abs_()
            worst = max(worst, float(error.max()))
            self._sum += float(error.sum())
            beyond += int((error > meant.abs().mul_(info.eps / 2).add_(floor)).sum())
        self._max = max(self._max, worst)
        self._count += stored.numel()
        if beyond:
            return f"{beyond} values are off by up to {worst:.3g}, more than rounding"
        return None

    def _scale(self, file: SafetensorsFile, key: str) -> Tensor:
        """A weight's new scale: from the same file, or from memory where it is in another."""
        return _read(file, key) if key in file.tensors else self.scales[key]


def _read(file: SafetensorsFile, name: str) -> Tensor:
    return TensorStore(str(file.path), "file", {name: Entry(file, name)}, {}).tensor(name)


def _peak(tensor: Tensor) -> float:
    return max(map(abs, extremes(tensor.float()))) if tensor.numel() else 0.0


def _digest(pieces: Iterable[memoryview]) -> bytes:
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()
