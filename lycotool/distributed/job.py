"""The store of a job, and a thread in each process that looks whether another one failed."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from lycotool.distributed.connection import LostError
from lycotool.distributed.place import PIDS, Place
from lycotool.errors import PeerFailedError, ResourceError, exit_code_of
from lycotool.lazy import torch

#: All must be there after so long.
_MEETING = datetime.timedelta(minutes=10)

#: Seconds between two looks at the store, and from an exception in another process to a hard end.
_LOOK, _GRACE = 0.1, 5.0

#: Keys of the store: ``rank:exit code`` of the first failure; how many know of it.
_FAILURE, _KNOWN = "failure", "known"


class Job:
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
        self._failure: PeerFailedError | LostError | None = None
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
        lost = isinstance(error, LostError)
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
                self._end(LostError(str(error)))
            return

    def _end(self, error: PeerFailedError | LostError) -> None:
        """End the main thread: by an exception, or, where it waits for a device, without."""
        self._failure = error
        if self._main is not None:
            signal.pthread_kill(self._main, signal.SIGUSR1)
            if self._closing.wait(_GRACE):
                return
        if isinstance(error, LostError):
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
