"""Several processes that do one job: how they find each other, talk, and end together.

A process belongs to a job if ``RANK`` and ``WORLD_SIZE`` are set, as ``torchrun``, ``accelerate
launch`` and job scripts set them; :mod:`lycotool.launching` starts such processes itself. Without
them :func:`joined` gives a world of one, and nothing of ``torch.distributed`` is touched.

What is small and of the host (counts, names, a flag) goes through gloo; tensors on GPUs through
NCCL, whose settings are left as they are. An exception in one process ends them all: it writes a
note into the job's store, a thread of each process reads that, and the first alone is reported.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from lycotool.devices import resolve_device
from lycotool.errors import PeerFailedError, ResourceError, UsageError, exit_code_of, is_out_of_memory
from lycotool.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")

#: Everyone's value to each process, by rank: :meth:`World.gather`.
Gather = Callable[[Any], list[Any]]

#: Where processes leave their numbers for :mod:`lycotool.launching`; unset if something else started them.
PIDS = "LYCOTOOL_PIDS"

#: One process may fill a cache or make images for hours while the others wait.
_PATIENCE = datetime.timedelta(hours=24)
#: All must be there after so long.
_MEETING = datetime.timedelta(minutes=10)

#: Seconds between two looks at the store, and from an exception in another process to a hard end.
_LOOK, _GRACE = 0.1, 5.0

#: Keys of the store: ``rank:exit code`` of the first failure; how many know of it.
_FAILURE, _KNOWN = "failure", "known"


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of a job this is.

    Attributes
    ----------
    local_rank
        Among those of this machine.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    port: int


def launched() -> Place | None:
    """The place in the environment; None if this process is the only one.

    Raises
    ------
    UsageError
        If the environment is incomplete or makes no sense.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size == 1:
        return None
    if rank >= size:
        raise UsageError(f"RANK is {rank}, WORLD_SIZE {size}", hint="ranks count from 0")
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UsageError(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT",
            hint="start with `torchrun`, or unset them for one process",
        )
    local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "RANK")
    return Place(rank, size, _number(local), os.environ["MASTER_ADDR"], _number("MASTER_PORT"))


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment, expected a whole number")
    return int(text)


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
            with _connected():
                torch.distributed.barrier()

    def share(self, value: Value) -> Value:
        """Rank 0's value, in every process; small, of what pickle takes."""
        if self.size == 1:
            return value
        box = [value]
        with _connected():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Everyone's value by rank, in every process; small, of what pickle takes."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _connected():
            torch.distributed.all_gather_object(found, value)
        return found

    def collect(self, value: Value) -> list[Value] | None:
        """Everyone's value by rank, in rank 0 alone; of what pickle takes, as large as its memory."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_main else None
        with _connected():
            torch.distributed.gather_object(value, found, dst=0)
        return found

    def largest(self, number: int) -> int:
        """The largest of everyone's numbers; waits for the hosts, not for their devices."""
        if self.size == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64)
        with _connected():
            torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor on :attr:`device` by the sum of everyone's, the same bits in all.

        On a GPU this is one kernel of NCCL on the current stream: the host does not wait, and a
        CUDA graph can hold it.
        """
        if self.size > 1:
            with _connected():
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
            with _connected():
                torch.distributed.reduce_scatter_tensor(own, whole, group=self._tensors)

    def join_parts(self, whole: Tensor, own: Tensor) -> None:
        """Put everyone's ``own`` into ``whole`` by rank; the reverse of :meth:`add_up_parts`."""
        if self.size > 1:
            with _connected():
                torch.distributed.all_gather_into_tensor(whole, own, group=self._tensors)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Be one of the processes of a job; alone, a world of one.

    Leaving waits for all. An exception that leaves ends all processes: the first that fails
    raises it, the others :class:`~lycotool.errors.PeerFailedError`, with the same exit code.

    Parameters
    ----------
    device
        ``auto``, ``cpu`` or ``cuda``; each process takes the GPU of its local rank.

    Raises
    ------
    UsageError
        If there is no such device, or not one for each.
    ResourceError
        If the others cannot be reached.
    """
    place = launched()
    if place is None:
        yield World(0, 1, resolve_device(device))
        return
    _leave_pid(place)
    job = _Job(place)
    try:
        world = _meet(place, job.store, device)
        yield world
        world.barrier()
        job.stop_watching()
        world.barrier()  # where rank 0 keeps the store, it must not go before the others look away
    except BaseException as error:  # noqa: BLE001 - raised again, there
        job.fail(error)
    finally:
        job.close()


def _leave_pid(place: Place) -> None:
    """Tell who started us how to hand on Ctrl-C: processes it starts are in sessions of their own."""
    if PIDS in os.environ:
        file = Path(os.environ[PIDS], str(place.rank))
        draft = file.with_suffix(".tmp")
        draft.write_text(str(os.getpid()), encoding="utf-8")
        draft.replace(file)


def _meet(place: Place, store: Any, name: str) -> World:  # noqa: ANN401 - as above
    distributed = torch.distributed
    device = _device(name, place)
    distributed.init_process_group(
        "gloo", store=store, rank=place.rank, world_size=place.size, timeout=_PATIENCE
    )
    world = World(place.rank, place.size, device)
    cards = world.gather((device.type, platform.node(), _card(device)))
    if len({kind for kind, _, _ in cards}) > 1:
        raise UsageError(
            "the processes compute on " + ", ".join(f"{kind} ({host})" for kind, host, _ in cards),
            hint="`--device` names one kind",
        )
    if device.type == "cpu":
        return world
    if len(set(cards)) < place.size:
        raise UsageError(f"{place.size} processes share {len(set(cards))} GPUs", hint="one process per GPU")
    torch.cuda.set_device(device)
    group = distributed.new_group(backend="nccl", timeout=_PATIENCE)
    world = World(place.rank, place.size, device, group)
    world.add_up(torch.zeros(1, device=device))  # connects; inside of a graph that cannot be done
    return world


def _device(name: str, place: Place) -> torch.device:
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UsageError(
            f"--device {name} is one device, there are {place.size} processes",
            hint="`--device cuda`; CUDA_VISIBLE_DEVICES says which, or `--device cpu`",
        )
    count = torch.cuda.device_count()
    index = place.local_rank if count > 1 else 0  # job scripts may show each process its own GPU alone
    if index >= count:
        raise UsageError(f"process {place.rank} has no GPU of its own: this machine has {count}")
    return torch.device("cuda", index)


def _card(device: torch.device) -> str:
    return "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Tell a process that is gone from a fault of ours."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise _LostError(str(error)) from error


class _LostError(ResourceError):
    """Nobody said why, but somebody is not there any more."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the connection to another process of the run is lost",
            details=reason.splitlines()[:1],
            hint="that process was killed, or ended without a message",
        )


class _Job:
    """The store of a job, and the thread that looks whether somebody failed."""

    def __init__(self, place: Place) -> None:
        distributed: Any = torch.distributed  # its type stubs lack the stores
        self._place = place
        try:
            rendezvous = distributed.rendezvous("env://", place.rank, place.size, timeout=_MEETING)
            base, _, _ = next(rendezvous)
            # Its own connection: one that waits would keep the other from being used.
            mine = distributed.TCPStore(place.host, place.port, is_master=False, timeout=_MEETING)
        except (RuntimeError, ValueError) as error:
            raise ResourceError(
                f"the other processes cannot be reached at {place.host}:{place.port}",
                details=str(error).splitlines()[:1],
                hint="unset RANK and WORLD_SIZE for one process",
            ) from None
        self.store = distributed.PrefixStore("lycotool/group", base)
        self._base = base
        self._notes = distributed.PrefixStore("lycotool/notes", mine)
        self._closing = threading.Event()
        self._failure: PeerFailedError | _LostError | None = None
        self._main = threading.main_thread().ident if _in_main_thread() else None
        self._previous: Any = signal.signal(signal.SIGUSR1, self._wake) if self._main else None
        self._thread = threading.Thread(target=self._watch, name="lycotool-peers", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> NoReturn:
        """Raise ``error`` if it is the first failure of the job, else what another one's leads to."""
        self.stop_watching()
        if self._failure is not None:  # whatever came of it here
            self._part(self._place.size)
            raise self._failure from None
        mine = f"{self._place.rank}:{exit_code_of(error)}"
        try:
            first = self._notes.compare_set(_FAILURE, "", mine).decode()
        except RuntimeError:  # the store is gone, and with it whoever kept it
            raise error from None
        lost = isinstance(error, _LostError)
        self._notice()
        self._part(self._place.size - lost)
        if first != mine:
            raise PeerFailedError(_code(first)) from None
        if lost and PIDS in os.environ:  # who started us sees more
            raise PeerFailedError(exit_code_of(error)) from None
        raise error

    def close(self) -> None:
        """Leave the group; nothing is waited for."""
        self.stop_watching()
        if self._main and self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None:
            torch.distributed.destroy_process_group()

    def _notice(self) -> None:
        """Be counted among those who know."""
        with contextlib.suppress(RuntimeError):
            self._notes.add(_KNOWN, 1)

    def _part(self, others: int) -> None:
        """Rank 0, which may keep the store, stays until all know, or do not answer."""
        end = time.monotonic() + _GRACE
        with contextlib.suppress(RuntimeError):
            while self._place.rank == 0 and time.monotonic() < end and self._notes.add(_KNOWN, 0) < others:
                time.sleep(_LOOK / 2)

    def stop_watching(self) -> None:
        """Do not look for failures any more."""
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK):
            try:
                if not self._notes.check([_FAILURE]):
                    continue
                code = _code(self._notes.get(_FAILURE).decode())
                self._notice()
                self._end(PeerFailedError(code))
            except RuntimeError as error:
                self._end(_LostError(str(error)))
            return

    def _end(self, error: PeerFailedError | _LostError) -> None:
        """End the main thread: by an exception, or, where it waits for a device, without."""
        self._failure = error
        if self._main is not None:
            signal.pthread_kill(self._main, signal.SIGUSR1)
            if self._closing.wait(_GRACE):
                return
        if isinstance(error, _LostError):
            sys.stderr.write(f"lycotool: error: {error.message}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        if self._failure is not None:
            raise self._failure


def _code(note: str) -> int:
    return int(note.partition(":")[2])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
