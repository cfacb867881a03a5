"""All processes of a job, and how they talk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lycotool.distributed.connection import connected
from lycotool.distributed.parcels import packed, unpacked
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")

#: Everyone's value to each process, by rank: :meth:`World.gather`.
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True, slots=True)
class World:
    """All processes of a job, seen from one of them.

    Attributes
    ----------
    rank
        This one's number; 0 writes files and speaks.
    size
        How many there are.
    device
        Where this one computes.
    """

    rank: int
    size: int
    device: torch.device
    _tensors: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            with connected():
                torch.distributed.barrier()

    def share(self, value: Value) -> Value:
        """Rank 0's value, in every process; small, of what pickle takes."""
        if self.size == 1:
            return value
        box = [value]
        with connected():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Everyone's value by rank, in every process; small, of what pickle takes."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with connected():
            torch.distributed.all_gather_object(found, value)
        return found

    def collect(self, value: Value) -> list[Value] | None:
        """Everyone's value by rank, in rank 0 alone, tensors on the CPU; as large as its memory."""
        if self.size == 1:
            return [value]
        with connected():
            if not self.is_main:
                text, tensors = packed(value)
                torch.distributed.gather_object(text, None, dst=0)
                for tensor in tensors:
                    torch.distributed.send(tensor, 0)
                return None
            texts: list[Any] = [None] * self.size
            torch.distributed.gather_object(b"", texts, dst=0)
            others = (
                unpacked(text, partial(torch.distributed.recv, src=rank))
                for rank, text in enumerate(texts[1:], 1)
            )
            return [value, *others]

    def largest(self, number: int) -> int:
        """The largest of everyone's numbers; waits for the hosts, not for their devices."""
        if self.size == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64)
        with connected():
            torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor on :attr:`device` by the sum of everyone's, the same bits in all.

        On a GPU this is one kernel of NCCL on the current stream: the host does not wait, and a
        CUDA graph can hold it.
        """
        if self.size > 1:
            with connected():
                torch.distributed.all_reduce(tensor, group=self._tensors)

    def add_up_parts(self, whole: Tensor, own: Tensor) -> None:
        """Put into ``own`` this process's part of the sum of everyone's ``whole``, of which it may be that part.

        Parameters
        ----------
        whole
            A vector of as many elements for each process.
        own
            The elements of this one, ``(whole.numel() / size,)``.
        """
        if self.size > 1:
            with connected():
                torch.distributed.reduce_scatter_tensor(own, whole, group=self._tensors)

    def join_parts(self, whole: Tensor, own: Tensor) -> None:
        """Put everyone's ``own`` into ``whole`` by rank; the reverse of :meth:`add_up_parts`."""
        if self.size > 1:
            with connected():
                torch.distributed.all_gather_into_tensor(whole, own, group=self._tensors)
