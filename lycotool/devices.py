"""Where to compute: decided once, in `ops`, and handed down."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lycotool.errors import UsageError
from lycotool.lazy import torch


def resolve_device(name: str, *, float64: bool = False) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda[:N]`` or ``mps`` into a device that exists.

    ``auto`` is the first of cuda, mps and cpu.

    Parameters
    ----------
    float64
        Whether the work needs float64, which mps does not have: ``auto`` then passes it over.

    Raises
    ------
    UsageError
        If the name is not a device, or this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() and not float64 else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no such device: {name}", hint="auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UsageError(
            f"{name}: CUDA has {torch.cuda.device_count()} devices here", hint="use `--device cpu`"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("mps is not available here", hint="use `--device cpu`")
    if device.type == "mps" and float64:
        raise UsageError("mps has no float64, which this needs", hint="use `--device cpu`")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"no such device: {name}", hint="auto, cpu, cuda, cuda:N or mps")
    return device


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_streams = threading.local()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Have a GPU work on a stream of this thread's own, so that it waits for its own work alone.

    What the default stream was given before is waited for; leaving waits for the work done
    inside, so its results are anybody's. On other devices nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    stream = getattr(_streams, "stream", None)
    if stream is None or stream.device != torch.empty(0, device=device).device:
        stream = _streams.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def ready_for_threads(device: torch.device) -> None:
    """Load what a device's linear algebra needs, before several threads use it.

    torch loads its CUDA part at the first decomposition, and fails ("lazy wrapper should be
    called at most once") where two threads come to that at the same time.
    """
    if device.type == "cuda":
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
