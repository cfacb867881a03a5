"""Being one of the processes of a job, from meeting the others to the common end."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lycotool.devices import processors, resolve_device
from lycotool.distributed.job import Job
from lycotool.distributed.place import PIDS, Place, launched
from lycotool.distributed.world import World
from lycotool.errors import UsageError
from lycotool.lazy import torch

#: One process may fill a cache or make images for hours while the others wait.
_PATIENCE = datetime.timedelta(hours=24)


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
    job = Job(place)
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
    torch.set_num_threads(threads([node for _, node, _ in cards].count(platform.node())))
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


def threads(processes: int) -> int:
    """How many of the processors are this process's, of those of the machine that so many share.

    What ``OMP_NUM_THREADS`` says, but for the 1 that torchrun sets where nobody set anything: with
    one thread, `extract` waits for the eigenproblems that a GPU leaves to the host, 49 s instead of 14.
    """
    own = torch.get_num_threads()
    return own if os.environ.get("OMP_NUM_THREADS", "1") != "1" else max(1, processors() // processes)


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
