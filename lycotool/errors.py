"""Every error lycotool raises on purpose, and the exit code each one ends with.

::

    LycotoolError                the tree's root; never raised itself
    ├── UsageError          2    wrong arguments, an input path that does not exist
    ├── BadInputError       3    a file is damaged, not what it says, of unknown format
    ├── UnsafeError         4    a file asks for something refused (code, leaving its folder)
    ├── IncompatibleError   5    sound files that do not fit each other
    ├── NumericError        6    NaN or infinity, in or out
    ├── OutputError         7    the output exists, no space, no permission
    ├── ResourceError       8    memory or size limit
    ├── RefusedError        9    a registry rule refuses; the message names the override
    └── CheckError         10    a check or verification found something

An error says what is wrong, where (file, key) and what to do next (hint).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class LycotoolError(Exception):
    """An error with a place and a way out.

    Parameters
    ----------
    message
        What was found and what was expected. No trailing period.
    path
        The file concerned.
    key
        The tensor or module concerned.
    details
        Further lines, one per fault, when several are reported together.
    hint
        What the user can do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        key: str | None = None,
        details: Sequence[str] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.key = key
        self.details = tuple(details)
        self.hint = hint

    @property
    def headline(self) -> str:
        """``path: key: message``, leaving out what is not known."""
        return ": ".join(part for part in (self.path, self.key, self.message) if part)


class UsageError(LycotoolError):
    """Wrong arguments, or an input path that does not exist."""

    exit_code = 2


class BadInputError(LycotoolError):
    """A file is damaged, is not what it says it is, or has an unknown format."""

    exit_code = 3


class UnsafeError(LycotoolError):
    """A file asks for something lycotool never does, such as running code."""

    exit_code = 4


class IncompatibleError(LycotoolError):
    """Sound files that do not fit each other."""

    exit_code = 5


class NumericError(LycotoolError):
    """NaN or infinity in an input, or a value that overflows the output's dtype."""

    exit_code = 6


class OutputError(LycotoolError):
    """The output cannot be written there."""

    exit_code = 7


class ResourceError(LycotoolError):
    """A memory or size limit was reached."""

    exit_code = 8


class RefusedError(LycotoolError):
    """A registry rule refuses; the hint names the option that overrides it."""

    exit_code = 9


class CheckError(LycotoolError):
    """A check the user asked for found something."""

    exit_code = 10


class PeerFailedError(BaseException):
    """Another process of the same job failed, and says why; this one ends without a word.

    Not an :class:`Exception`: nothing handles it but what ends the process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process of the run failed with exit code {exit_code}")
        self.exit_code = exit_code


INTERNAL, INTERRUPTED = 1, 130


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that ends by ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_out_of_memory(error):
        return ResourceError.exit_code
    return int(getattr(error, "exit_code", INTERNAL))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is any of the forms in which memory runs out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and any(word in str(error) for word in ("allocate memory", "start new thread"))
        )
    )


def listed(names: Sequence[str], limit: int = 20) -> list[str]:
    """At most ``limit`` names, and a last line that counts the rest."""
    if len(names) <= limit:
        return list(names)
    return [*names[:limit], f"… and {len(names) - limit} more"]
