"""Functions run by several processes at once, as ``torchrun`` would start them.

The processes are forked from a server that has imported torch, so that a test costs no import.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import typer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["imported_for_ranks"])

#: Seconds after which a test counts as hanging.
_PATIENCE = 90.0


@dataclass(frozen=True)
class Ended:
    """What became of one process."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def run_ranks(folder: Path, target: Callable[..., None], *arguments: Any, ranks: int = 2) -> list[Ended]:
    """``target(*arguments)`` in ``ranks`` processes; a process still running at the end is a failure."""
    port = _free_port()
    places = [
        {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": str(port)}
        for rank in range(ranks)
    ]  # fmt: skip
    files = [(folder / f"rank{rank}.out", folder / f"rank{rank}.err") for rank in range(ranks)]
    processes = [
        _CONTEXT.Process(target=_run, args=(place, tuple(map(str, pair)), str(Path.cwd()), target, arguments))
        for place, pair in zip(places, files, strict=True)
    ]
    _start_server()
    begin = time.monotonic()
    for process in processes:
        process.start()
    seconds = []
    for process in processes:
        process.join(max(1.0, begin + _PATIENCE - time.monotonic()))
        seconds.append(time.monotonic() - begin)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
        processes[rank].join()
    texts = [tuple(file.read_text(encoding="utf-8") for file in pair) for pair in files]
    assert not hanging, (hanging, texts)
    return [
        Ended(process.exitcode if process.exitcode is not None else 1, *text, seconds=second)
        for process, text, second in zip(processes, texts, seconds, strict=True)
    ]


def _start_server() -> None:
    """Wait until the server has imported everything.

    It ignores what it cannot import, and before Python 3.13 it has the path of a fresh interpreter.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    first = _CONTEXT.Process(target=_has_imported)
    first.start()
    first.join()
    assert first.exitcode == 0


def _has_imported() -> None:
    assert "imported_for_ranks" in sys.modules


def in_threads(work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """``work(rank, gather)`` of two ranks at once, where nothing but `World.gather` is used; what each gives."""
    barrier = threading.Barrier(2, timeout=30)
    values: list[Any] = [None, None]

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: work(rank, lambda value: gather(rank, value)), (0, 1)))


def lycotool(arguments: Sequence[object]) -> None:
    """A target: the command line."""
    from lycotool.cli import main

    sys.argv = ["lycotool", *map(str, arguments)]
    main()


def _run(
    place: dict[str, str],
    files: tuple[str, str],
    folder: str,
    target: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(place)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - to the end of the process
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        target(*arguments)
    except typer.Exit as end:  # of a command that is called as a function
        sys.exit(end.exit_code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
