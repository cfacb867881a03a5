"""What every call of the command line does alike, done once for the tests of one process."""

from __future__ import annotations

import functools
import gc
import weakref

import typer.main
import typer.testing


def build_commands_once() -> None:
    """Remember what Typer makes of the declarations of all options: half the time of a short call."""
    if not hasattr(typer.main.get_command, "cache_clear"):
        typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)


def get_ready_to_fork() -> None:
    """Let children share what they never change."""
    for library in weakref.finalize._registry:  # torch's operators, taken apart one by one at the end
        weakref.finalize._registry[library].atexit = False
    gc.collect()
    gc.freeze()  # else the first collection in a child copies all memory
