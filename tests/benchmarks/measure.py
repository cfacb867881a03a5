"""Run a command to its end: seconds, processor time and memory. Only the standard library here.

A child's high-water mark of memory starts from that of the process that started it, so that one
must be small: nothing in it may import torch, numpy, or anything else that is large.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

_SAMPLE_SECONDS = 0.02

#: Where a child writes the most memory that torch took on the GPU.
GPU_FILE = "LYCOTOOL_BENCHMARK_GPU"


@dataclass(frozen=True, slots=True)
class Run:
    """One child process.

    Attributes
    ----------
    seconds, cpu
        On the clock, and of all processors.
    rss
        The kernel's high-water mark of resident memory, mapped files included.
    anonymous
        The largest RssAnon seen: memory of the process alone.
    gpu
        The most that torch reserved on the GPU, without the driver's own; None where it was not asked.
    answer
        What the child printed, as JSON, where that is asked for.
    """

    seconds: float
    cpu: float
    rss: int
    anonymous: int
    gpu: int | None = None
    answer: object = None


def environment() -> dict[str, str]:
    """What children run with: this copy of lycotool, and the modules of the tests."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    found.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled once
    return found


def python(module: str, *arguments: object) -> list[str]:
    """A command that runs a module."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(command: Sequence[str], *, folder: Path, gpu: bool = False, answers: bool = False) -> Run:
    """Run a command and watch its memory.

    Raises
    ------
    SystemExit
        If it fails, with the end of what it said.
    """
    note = folder / "gpu.txt"
    note.unlink(missing_ok=True)
    env = environment() | ({GPU_FILE: str(note)} if gpu else {})
    peak = 0
    done = threading.Event()
    with (folder / "stdout.txt").open("w+b") as out, (folder / "stderr.txt").open("w+b") as err:
        start = time.perf_counter()
        process = subprocess.Popen([*command], stdout=out, stderr=err, cwd=ROOT, env=env)

        def watch() -> None:
            nonlocal peak
            while not done.wait(_SAMPLE_SECONDS):
                peak = max(peak, _anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
        out.seek(0)
        err.seek(0)
        if process.returncode:
            said = err.read()[-2000:].decode(errors="replace")
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said}")
        answer = json.loads(out.read()) if answers else None
    reserved = int(note.read_text()) if gpu and note.exists() else None
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak, reserved, answer)


def _anonymous(pid: int) -> int:
    """RssAnon of a process; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines.get("RssAnon", "0 kB").split()[0]) * 1024


def floor() -> int:
    """Memory below which no child's high-water mark can be: that of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
