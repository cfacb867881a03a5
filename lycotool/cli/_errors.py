"""From an exception to a message and an exit code; the only place that catches broadly."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import ParamSpec

import typer

from lycotool.cli._text import clean
from lycotool.errors import (
    INTERNAL,
    BadInputError,
    CheckError,
    IncompatibleError,
    LycotoolError,
    NumericError,
    OutputError,
    PeerFailedError,
    RefusedError,
    ResourceError,
    UnsafeError,
    exit_code_of,
    is_out_of_memory,
)

P = ParamSpec("P")

#: What a full disk behind standard output says; files of our own say it with their names.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

TERMINATED = 143

#: What fits a screen; `--json` has them all.
_MOST_DETAILS = 40

#: What helps with most errors of a class, for those that say nothing better themselves.
HINTS: Mapping[type[LycotoolError], str] = {
    BadInputError: "a download may be incomplete: compare its size or SHA-256 (`lycotool inspect FILE --hashes`), or get it again",
    UnsafeError: "get the file as .safetensors, from somewhere you trust",
    IncompatibleError: "`lycotool inspect FILE` shows what each file is, and for which model",
    NumericError: "`lycotool inspect FILE --check` names what is not finite; `--dtype fp32` or bf16 holds larger values",
    OutputError: "`-o` names another place",
    ResourceError: "`--dry-run` says how much memory is needed; `--device cpu` needs no GPU memory",
    RefusedError: "`lycotool inspect FILE` shows the rules that apply",
    CheckError: "scripts can tell this by exit code 10; what was found is above",
}


class _Terminated(BaseException):
    """SIGTERM, so that clean-up runs as for Ctrl-C."""

    exit_code = TERMINATED


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Run a command; end with the message and exit code ``cli.md`` promises.

    ``LYCOTOOL_DEBUG=1`` lets every exception through with its traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        previous = signal.signal(signal.SIGTERM, _terminate)
        as_json = bool(kwargs.get("json_output"))
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:
            # The reader went away, as `| head` does. Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (KeyboardInterrupt, _Terminated) as stop:
            _say("interrupted", as_json=as_json)
            # CPython remembers an interrupt that came through `exec`, as imports of torch have it, until the
            # next one, and would end by SIGINT instead of with this exit code.
            exec("")
            raise typer.Exit(exit_code_of(stop)) from None
        except PeerFailedError as end:
            raise typer.Exit(end.exit_code) from None
        except LycotoolError as error:
            _debug()
            report(error, _hint(error, command.__name__), as_json=as_json)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _debug()
            if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                hint = "what was printed is not whole; files that were written are"
                report(OutputError(f"standard output: {error.strerror}"), hint, as_json=as_json)
                raise typer.Exit(OutputError.exit_code) from None
            code, text = _unexpected(error)
            _say(text, as_json=as_json)
            raise typer.Exit(code) from None
        finally:
            signal.signal(signal.SIGTERM, previous)

    return run


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _debug() -> None:
    if os.environ.get("LYCOTOOL_DEBUG") == "1":
        raise  # noqa: PLE0704 - called from an except block, to keep its traceback


def _unexpected(error: Exception) -> tuple[int, str]:
    """Memory exhaustion, in its several forms; anything else is a bug of ours."""
    if is_out_of_memory(error):
        return ResourceError.exit_code, "out of memory; `--device cpu` needs no GPU memory"
    return INTERNAL, (
        f"internal error: {type(error).__name__}: {error}. This is a bug in lycotool, please report it"
        " (LYCOTOOL_DEBUG=1 shows where)"
    )


def _hint(error: LycotoolError, command: str) -> str:
    """What the user can do: the error's own hint, else the one of its class."""
    if error.hint:
        return error.hint
    name = "" if command.startswith("_") else f" {command}"
    return HINTS.get(type(error), f"`lycotool{name} --help` lists arguments and options, with examples")


def report(error: LycotoolError, hint: str, *, as_json: bool) -> None:
    """Print an error on stderr: what, where, and what to do; or one JSON object."""
    if as_json:
        document = {
            "class": type(error).__name__,
            "exit_code": error.exit_code,
            "path": error.path,
            "key": error.key,
            "message": error.message,
            "details": list(error.details),
            "hint": hint,
        }
        sys.stderr.write(json.dumps({"error": document}) + "\n")
        return
    details = error.details
    if len(details) > _MOST_DETAILS:
        details = _by_reason(details)
    if len(details) > _MOST_DETAILS:
        rest = len(details) - _MOST_DETAILS
        details = (*details[:_MOST_DETAILS], f"… and {rest} more, which `--json` lists too")
    lines = [f"lycotool: error: {error.headline}", *(f"  {detail}" for detail in details)]
    lines.append(f"hint: {hint}")
    sys.stderr.write("".join(clean(line) + "\n" for line in lines))


def _by_reason(details: tuple[str, ...]) -> tuple[str, ...]:
    """``NAME: REASON`` of many names as a line for each reason; other lines as they are.

    >>> _by_reason(("a: too big", "b: too big", "c: odd", "d: too big", "e: too big"))
    ('too big: a, b, d and 1 more, which `--json` lists too', 'c: odd')
    """
    names: dict[str, list[str]] = {}
    for detail in details:
        name, _, reason = detail.partition(": ")
        names.setdefault(reason, []).append(name)
    if "" in names:
        return details
    lines = []
    for reason, those in names.items():
        rest = f" and {len(those) - 3} more, which `--json` lists too" if len(those) > 3 else ""
        many = f"{reason}: {', '.join(those[:3])}{rest}"
        lines.append(many if len(those) > 1 else f"{those[0]}: {reason}")
    return tuple(lines)


def _say(text: str, *, as_json: bool) -> None:
    if as_json:
        sys.stderr.write(json.dumps({"error": {"message": text}}) + "\n")
    else:
        sys.stderr.write(clean(f"lycotool: error: {text}") + "\n")
