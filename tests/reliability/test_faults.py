"""Faults injected at system calls: a share of them, spread over every call of every job.

``python -m tests.reliability faults`` runs all.
"""

from __future__ import annotations

import errno
import mmap
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from reliability.changes import changed_while_read
from reliability.injection import (
    ERRORS,
    JOBS,
    JOBS_BY_NAME,
    Job,
    Struck,
    large,
    strike_errors,
    strike_kills,
    strike_signals,
    strike_truncations,
)
from reliability.lab import (
    BAD_INPUT,
    INTERRUPTED,
    OK,
    OUTPUT,
    TERMINATED,
    Server,
    Setting,
    Snapshot,
    digest_of,
)
from reliability.tensors import companions


@pytest.fixture(autouse=True)
def _can_inject(server: Server) -> None:
    assert server.injects, "faults are injected by a library that needs a C compiler on Linux"


@pytest.fixture(params=JOBS, ids=lambda job: job.name)
def struck(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Struck:
    job: Job = request.param
    return Struck(server, job, tmp_path)


def test_error_at_every_call(struck: Struck) -> None:
    """Calls that are no reads, with each of the errors in turn."""
    points = struck.some(struck.points(reading=False), 2)
    ended = list(strike_errors(struck, [(nth, ERRORS[n % len(ERRORS)]) for n, nth in enumerate(points)]))
    assert any(one.code == OUTPUT for one in ended)


def test_read_error(struck: Struck) -> None:
    list(strike_errors(struck, [(nth, errno.EIO) for nth in struck.some(struck.points(reading=True), 4)]))


def test_kill_at_every_call(struck: Struck) -> None:
    list(strike_kills(struck, struck.some(struck.points(reading=False), 4)))


def test_interrupt_at_every_call(struck: Struck) -> None:
    """Reading, computing, writing, publishing."""
    list(strike_signals(struck, struck.some(range(1, len(struck.calls) + 1), 6), signal.SIGINT))


def test_source_cut_short(struck: Struck) -> None:
    list(strike_truncations(struck, struck.some(struck.read_points(), 4)))


def test_the_system_copies_what_is_large(server: Server, tmp_path: Path) -> None:
    """So that the tests above strike that too; and a file system that cannot is gone round."""
    struck = Struck(server, JOBS_BY_NAME["bake-large"], tmp_path)
    copies = [nth for nth, call in enumerate(struck.calls, 1) if call == "copy"]
    assert copies
    codes = {errno.EXDEV: OK, errno.ENOSPC: OUTPUT, errno.EIO: OUTPUT}
    faults = [(nth, number) for nth in copies for number in codes]
    struck_copies = 0
    for (nth, number), ended in zip(faults, strike_errors(struck, faults), strict=True):
        if ended.trace[nth - 1] == "copy":  # reading goes on meanwhile, and may be faster this time
            struck_copies += 1
            assert ended.code == codes[number], ended.text
    assert struck_copies
    for ended in strike_truncations(struck, copies):
        assert ended.code == BAD_INPUT, ended.text


@pytest.mark.parametrize("name", ["merge", "new-file"])
def test_order_of_calls(name: str, server: Server, tmp_path: Path) -> None:
    """Data before the name, and the name before the end."""
    calls = Struck(server, JOBS_BY_NAME[name], tmp_path).calls
    last_write = max(n for n, call in enumerate(calls) if call == "write")
    assert calls.index("fallocate") < calls.index("write")
    assert last_write < calls.index("fsync") < calls.index("rename") < calls.index("fsync a folder")


def test_output_in_use(server: Server, tmp_path: Path) -> None:
    """Who has the old file open or mapped keeps it; where the system refuses, so does the command.

    Windows refuses to rename over such a file, which Python reports as EACCES; network file
    systems do with EBUSY, and programs that run with ETXTBSY.
    """
    struck = Struck(server, JOBS_BY_NAME["merge"], tmp_path / "refused")
    (rename,) = [nth for nth, call in enumerate(struck.calls, 1) if call == "rename"]
    for ended in strike_errors(
        struck, [(rename, number) for number in (errno.EACCES, errno.EBUSY, errno.ETXTBSY)]
    ):
        assert ended.code == OUTPUT, ended.text
    companions(tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old" * 2000)
    with out.open("rb") as held, mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        ended = server.run(tmp_path, struck.job.argv)
        assert ended.code == OK, ended.text
        assert mapped[:] == held.read() == b"old" * 2000
    assert struck.outputs(Snapshot.of(tmp_path)) == struck.outputs(struck.finished)


def test_files_that_cannot_be_mapped_are_refused_to_who_tries(server: Server, tmp_path: Path) -> None:
    """What row K09 relies on."""
    (tmp_path / "a").write_bytes(b"a")
    code = "import mmap; a = open('a'); mmap.mmap(a.fileno(), 0, access=mmap.ACCESS_READ)"
    assert server.run(tmp_path, ["--python", code]).code == 0
    refused = server.run(tmp_path, ["--python", code], Setting(maps=False))
    assert refused.code == 1
    assert b"No such device" in refused.stderr


def test_kill_at_random_times(server: Server, tmp_path: Path) -> None:
    signals_in_a_large_write(server, tmp_path, signal.SIGKILL, megabytes=64, count=6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_random_times(number: int, server: Server, tmp_path: Path) -> None:
    found = signals_in_a_large_write(server, tmp_path, number, megabytes=64, count=3)
    assert not found.hidden


@dataclass
class Signalled:
    """What a signal at several times of a write left.

    Attributes
    ----------
    old, new
        How often the old file was there afterwards, and the new one.
    stopped
        How often the program was still running.
    hidden
        How often a temporary file was left.
    longest
        Seconds from the signal to the end.
    """

    old: int = 0
    new: int = 0
    stopped: int = 0
    hidden: int = 0
    longest: float = 0.0


def signals_in_a_large_write(
    server: Server, folder: Path, number: int, *, megabytes: int, count: int
) -> Signalled:
    """A signal, spread over the time that a large write takes: the old file or the new one, whole."""
    large(folder, megabytes)
    out = folder / "out.safetensors"
    argv = ("bake", "large.safetensors", "thin.safetensors", "--force", "-o", out.name)
    for _ in range(2):  # the first run also fills the system's caches
        out.write_bytes(b"old")
        ended = server.run(folder, argv, Setting(timeout=600))
        assert ended.code == OK, ended.text
    size, new = out.stat().st_size, digest_of(out)
    inputs = {path: digest_of(path) for path in folder.iterdir() if path != out}
    codes = {signal.SIGKILL: -9, signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
    found = Signalled()
    for step in range(count):
        out.write_bytes(b"old")
        delay = ended.seconds * (step + 0.5) / count
        struck = server.run(folder, argv, Setting(kill_after=delay, kill_with=number, timeout=600))
        assert struck.code in (codes[number], OK), struck.text
        if out.stat().st_size == size:
            assert digest_of(out) == new
            found.new += 1
        else:
            assert out.read_bytes() == b"old"
            assert struck.code != OK
            found.old += 1
        if struck.code != OK:
            found.stopped += 1
            found.longest = max(found.longest, struck.seconds - delay)
        left = [path for path in folder.iterdir() if path.name.startswith(".lycotool-")]
        found.hidden += bool(left)
        for path in left:
            path.unlink()
    assert {path: digest_of(path) for path in folder.iterdir() if path != out} == inputs
    return found


@pytest.mark.parametrize("command", ["edit", "merge"])
def test_inputs_that_change_while_they_are_read(command: str, server: Server, tmp_path: Path) -> None:
    """Overwritten, cut, lengthened and replaced; ``python -m tests.reliability changes`` does it to all commands."""
    folder = tmp_path / "work"
    folder.mkdir()
    outcome = changed_while_read(server, folder, command, rounds=4)
    assert sum(outcome.ends.values()) == 4


@pytest.mark.parametrize("rounds", [3])
def test_writers_of_one_output(rounds: int, server: Server, tmp_path: Path) -> None:
    writers_of_one_output(server, tmp_path, rounds)


def writers_of_one_output(server: Server, folder: Path, rounds: int) -> None:
    """Four processes write different files under one name: one of them is there, whole."""
    companions(folder)
    wanted = []
    for strength in range(1, 5):
        solo = server.run(
            folder, ("merge", "good.safetensors", f"good.safetensors:{strength}", "-o", "solo.safetensors")
        )
        assert solo.code == OK, solo.text
        wanted.append((folder / "solo.safetensors").read_bytes())
        (folder / "solo.safetensors").unlink()
    argv = ("merge", "good.safetensors", "good.safetensors:{copy}", "--force", "-o", "out.safetensors")
    for _ in range(rounds):
        ended = server.run(folder, argv, Setting(copies=4))
        assert set(ended.codes) <= {OK, OUTPUT}, ended.text
        assert b"Traceback" not in ended.stderr
        assert (folder / "out.safetensors").read_bytes() in wanted
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".lycotool-")]
