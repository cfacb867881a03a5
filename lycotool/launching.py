"""Starting this command again as several processes, by ``torch.distributed.run``.

The engine of ``torchrun`` runs in a thread of this process: it places the processes and sees
how they end. What the user sees stays that of one command: its own message, not torch's report,
its exit code, and Ctrl-C that leaves the processes the time to save.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lycotool.distributed import PIDS
from lycotool.errors import INTERNAL, PeerFailedError, ResourceError, UsageError
from lycotool.lazy import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Seconds between two looks at the processes.
_LOOK = 0.1

#: The third signal ends what two could not.
_PATIENCE = 2


def how_many(text: str, device: str) -> int:
    """Processes that ``--gpus`` asks for.

    Parameters
    ----------
    text
        A number, or ``auto`` for every GPU there is.
    device
        Of ``--device``; on ``cpu`` any number of processes can share it.

    Raises
    ------
    UsageError
        If it is no number, or there are fewer GPUs.
    """
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"--gpus is {text!r}, expected a number of GPUs, or auto")
    kind = device.partition(":")[0]
    if text == "1" or (text == "auto" and kind not in ("auto", "cuda")):
        return 1
    there = torch.cuda.device_count() if kind in ("auto", "cuda") else 0
    wanted = max(1, there) if text == "auto" else int(text)
    if kind != "cpu" and wanted > there and wanted > 1:
        raise UsageError(
            f"--gpus {wanted}: CUDA has {there} devices here",
            hint="`--gpus auto` takes all there are; `--device cpu` tries it without",
        )
    if wanted > 1 and ":" in device:
        raise UsageError(
            f"--device {device} is one device, --gpus {wanted} are several",
            hint="CUDA_VISIBLE_DEVICES says which",
        )
    return wanted


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run ``lycotool`` with these arguments as ``count`` processes of one job, to their end.

    Raises
    ------
    PeerFailedError
        If a process failed; it has said why.
    ResourceError
        If one was killed.
    """
    engine = _Engine(count, arguments)
    with (
        tempfile.TemporaryDirectory(prefix="lycotool-") as folder,
        _environment(folder),
        _without_logging(),
        _handing_on(Path(folder), count) as hand_on,
    ):
        engine.start()
        while engine.is_alive():
            engine.join(_LOOK)
            hand_on()
    if engine.error is not None:
        raise engine.error


class _Engine(threading.Thread):
    """``torchrun --standalone``, without its command line and without its handling of signals."""

    def __init__(self, count: int, arguments: Sequence[str]) -> None:
        super().__init__(name="lycotool-launcher", daemon=True)
        self.error: BaseException | None = None
        self._count = count
        self._arguments = list(arguments)

    def run(self) -> None:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            engine: Any = torchrun  # without types
            here = ["--standalone", "--nproc-per-node", str(self._count), "-m", "lycotool"]
            options = engine.parse_args(here)
            # Not parsed: what two of its options begin with would be an error there.
            options.training_script_args = self._arguments
            engine.run(options)
        except ChildFailedError as error:
            self.error = _failure({rank: found.exitcode for rank, found in error.failures.items()})
        except BaseException as error:  # noqa: BLE001 - raised again, in the main thread
            self.error = error


def _failure(codes: dict[int, int]) -> BaseException:
    """What a command whose processes ended so ends with."""
    said = [code for code in codes.values() if code > 0]
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if not killed:
        return PeerFailedError(said[0] if said else INTERNAL)
    rank, number = next(iter(killed.items()))
    return ResourceError(
        f"process {rank} was killed by {signal.Signals(number).name}",
        hint="memory may have run out: `dmesg` says; a smaller `--batch-size` needs less",
    )


@contextmanager
def _without_logging() -> Iterator[None]:
    """The engine logs what the processes have said already."""
    before = logging.root.manager.disable
    if os.environ.get("LYCOTOOL_DEBUG") != "1":
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    own = {PIDS: folder, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    added = {name: value for name, value in own.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _handing_on(folder: Path, count: int) -> Iterator[Any]:
    """Hand SIGINT and SIGTERM on to the processes, as soon as they are there; yields what does it."""
    waiting: list[int] = []
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        waiting.append(signal.SIGKILL if received > _PATIENCE else number)

    def hand_on() -> None:
        if not waiting:
            return
        there = [int(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name.isdecimal()]
        if len(there) < count:
            return
        number = waiting.pop(0)
        for pid in there:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield hand_on
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
