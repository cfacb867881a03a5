"""Tensors in memory that are read as if they were a file's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.io.dtypes import from_torch
from lycotool.io.header import TensorInfo
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class MemoryFile:
    """Named tensors that came from a file, or were made from one.

    Parameters
    ----------
    path
        That file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(from_torch(t.dtype), tuple(t.shape), 0, t.numel() * t.element_size())
            for name, t in tensors.items()
        }

    def _bytes(self, name: str) -> memoryview:
        flat = self._tensors[name].contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes."""
        buffer[:] = self._bytes(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes."""
        if self.tensors[name].nbytes:
            yield self._bytes(name)

    def close(self) -> None:
        """Nothing is open."""
