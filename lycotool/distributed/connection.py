"""Whether the other processes of a job are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lycotool.errors import ResourceError, is_out_of_memory


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Tell a process that is gone from a fault of ours."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise LostError(str(error)) from error


class LostError(ResourceError):
    """Nobody said why, but somebody is not there any more."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the connection to another process of the run is lost",
            details=reason.splitlines()[:1],
            hint="that process was killed, or ended without a message",
        )
