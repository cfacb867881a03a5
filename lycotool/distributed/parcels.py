"""An object of one process for another one, the tensors in it as bare bytes.

pickle takes a tensor through a file of its own, which takes 9 ms for each MB there and back; what is sent
here is what is in memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def packed(value: object) -> tuple[bytes, list[Tensor]]:
    """``value`` as pickle has it but for its tensors, and these by number, as bytes on the CPU."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    return file.getvalue(), packer.tensors


def unpacked(text: bytes, receive: Callable[[Tensor], object]) -> Any:  # noqa: ANN401 - whatever was packed
    """The inverse of :func:`packed`.

    Parameters
    ----------
    receive
        Fills a tensor of bytes with the next of :func:`packed`'s that is not empty.
    """
    return _Unpacker(io.BytesIO(text), receive).load()


class _Packer(pickle.Pickler):
    """Leaves the tensors out, and keeps them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> tuple[torch.dtype, tuple[int, ...]] | None:
        if not isinstance(value, torch.Tensor):
            return None
        here = value.detach().to("cpu").contiguous()
        if here.numel():
            self.tensors.append(here.reshape(-1).view(torch.uint8))
        return here.dtype, tuple(here.shape)


class _Unpacker(pickle.Unpickler):
    """Asks for the tensors in the order they were left out in."""

    def __init__(self, file: io.BytesIO, receive: Callable[[Tensor], object]) -> None:
        super().__init__(file)
        self._receive = receive

    def persistent_load(self, described: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
        dtype, shape = described
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._receive(tensor.reshape(-1).view(torch.uint8))
        return tensor
