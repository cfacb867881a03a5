"""Which process of a job this is, as launchers say in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lycotool.errors import UsageError

#: Where processes leave their numbers for :mod:`lycotool.launching`; unset if something else started them.
PIDS = "LYCOTOOL_PIDS"


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
