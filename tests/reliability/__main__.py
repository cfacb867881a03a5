"""Run everything that the tests take a share of, and print the figures.

::

    python -m tests.reliability table                 what the table has, and what is not tried
    python -m tests.reliability faults [JOB...]       every error, signal and cut at every call
    python -m tests.reliability kills N MEGABYTES     SIGKILL, SIGINT and SIGTERM spread over a large write
    python -m tests.reliability disk STEPS            a disk that fills up, in so many steps
    python -m tests.reliability memory STEPS          less and less memory, in so many steps
    python -m tests.reliability sizes GIGABYTES       memory that commands take of a checkpoint of that size
    python -m tests.reliability preflight GIGABYTES [N]   time until an error that needs no tensor, the longest of N
    python -m tests.reliability writers ROUNDS        four writers of one output
    python -m tests.reliability coverage [PYTEST...]  branches of what reads and writes files
    python -m tests.reliability changes ROUNDS        inputs that change, so often for each command that reads
    python -m tests.reliability fuzz N [TARGET...]    N executions of each parser
    python -m tests.reliability.guided TARGET ...     the same by coverage, with atheris and its options
"""

from __future__ import annotations

import collections
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability import injection
from reliability.cases import VERBS
from reliability.changes import COMMANDS, changed_while_read
from reliability.covered import branch_coverage
from reliability.full_disk import run_on_full_disk
from reliability.fuzz import Tally, Targets, execute
from reliability.lab import Server
from reliability.preflight import refusals
from reliability.sizes import MIB, SIZED, measured
from reliability.table import CASES, ELSEWHERE, ROWS, RUNS, UNTRIED
from reliability.test_faults import signals_in_a_large_write, writers_of_one_output
from reliability.test_full_disk import LARGE, four_mebibytes
from reliability.test_resources import MEMORY_VERBS, memory_ladder, wide

#: Executions after which the fuzzer says how far it is.
BATCH = 20_000


def table() -> None:
    """Count the rows."""
    print(
        f"{len(ROWS)} rows: {len(CASES)} cases run as {len(RUNS)} command lines, {len(ELSEWHERE)} by tests of"
    )
    print(f"their own, {len(UNTRIED)} not tried:")
    for row in UNTRIED:
        print(f"  {row.id} {row.what}: {row.reason}")
    print("where another outcome than the study's holds:")
    for case in CASES:
        if case.decision:
            print(f"  {case.id} {case.what}: {case.decision}")


def faults(names: list[str]) -> None:
    """Strike every call of every job."""
    server = Server()
    total: collections.Counter[str] = collections.Counter()
    try:
        for name in names or list(injection.JOBS_BY_NAME):
            with tempfile.TemporaryDirectory() as folder:
                struck = injection.Struck(server, injection.JOBS_BY_NAME[name], Path(folder))
                writing, reading = struck.points(reading=False), struck.points(reading=True)
                errors = [(nth, number) for nth in writing for number in injection.ERRORS]
                errors += [(nth, injection.ERRORS[1]) for nth in reading]
                counts = {
                    "errors": sum(1 for _ in injection.strike_errors(struck, errors)),
                    "interrupts": sum(
                        1
                        for _ in injection.strike_signals(
                            struck, range(1, len(struck.calls) + 1), signal.SIGINT
                        )
                    ),
                    "cuts": sum(1 for _ in injection.strike_truncations(struck, struck.read_points())),
                }
                litter = list(injection.strike_kills(struck, writing))
                counts |= {"kills": len(litter), "kills that left a hidden file": sum(litter)}
            total.update(counts)
            print(f"{name}: {len(struck.calls)} calls; {counts}", flush=True)
    finally:
        server.close()
    print(f"all: {dict(total)}")


def disk(steps: int) -> None:
    """Fill a disk up: one in memory, and one with an ext4."""
    server = Server()
    for kind in ("tmpfs", "ext4"):
        codes: collections.Counter[tuple[str, int]] = collections.Counter()
        with tempfile.TemporaryDirectory() as place:
            ladder = [1060 * step // (steps - 1) for step in range(steps)]
            folder = Path(place)
            large = {"prepare": four_mebibytes, "kilobytes": 10240}
            outcomes = [run_on_full_disk(server, LARGE, folder / "large", ladder, kind=kind, **large)]
            outcomes += [
                run_on_full_disk(server, job, folder / job.name, range(17), kind=kind)
                for job in injection.SMALL_JOBS
            ]
        for outcome in outcomes:
            codes.update((outcome.how, code) for code in outcome.codes.values())
        refused = sum(count for (_, code), count in codes.items() if code)
        print(
            f"{codes.total()} runs ({', '.join(sorted({how for how, _ in codes}))}): {refused} refused with "
            "the reason and nothing left, the others whole",
            flush=True,
        )
    server.close()


def memory(steps: int) -> None:
    """Let every command run out of memory."""
    server = Server(faults=False)
    codes: collections.Counter[int] = collections.Counter()
    for verb in MEMORY_VERBS:
        with tempfile.TemporaryDirectory() as folder:
            wide(Path(folder))
            argv = [part.replace("{x}", "good.safetensors") for part in VERBS[verb]]
            ladder = tuple(range(2, steps + 2))  # with less than 2 MiB the system's own loader gives up
            codes.update(memory_ladder(server, Path(folder), argv, steps=ladder))
    server.close()
    print(f"{codes.total()} runs: {codes[0]} done, {codes[8]} ended with exit code 8 and nothing left")


def sizes(gigabytes: int) -> None:
    """Measure every command on inputs that are far larger than what they may take."""
    server, is_over = Server(faults=False), False
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(server, Path(folder), list(SIZED), megabytes=1024 * gigabytes, layer=16, adapter=256)
        for one in rows:
            print(
                f"{one.name}: {one.peak / MIB:.0f} MiB of {one.bound / MIB:.0f} allowed; with the program "
                f"{one.whole / 1e6:.0f} MB, 300 MB and six tensors are {one.floor / 1e6:.0f}; {one.seconds:.0f} s"
                + ("; MORE THAN ALLOWED" if one.peak > one.bound else ""),
                flush=True,
            )
            is_over |= one.peak > one.bound
    server.close()
    sys.exit(is_over)


def preflight(gigabytes: float, repeats: int) -> None:
    """How long it takes until an error that no tensor is needed for."""
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for one in refusals(Path(folder), gigabytes, repeats=repeats):
            print(f"{one.seconds:5.2f} s  {one.command}, {one.fault}: {one.message[:120]}", flush=True)
            longest = max(longest, one.seconds)
    print(f"at most {longest:.2f} s")


def kills(count: int, megabytes: int) -> None:
    """Kill, interrupt and end a large write."""
    server = Server(faults=False)
    for number, times in ((signal.SIGKILL, count), (signal.SIGINT, count // 4), (signal.SIGTERM, count // 4)):
        with tempfile.TemporaryDirectory() as folder:
            found = signals_in_a_large_write(server, Path(folder), number, megabytes=megabytes, count=times)
        print(
            f"{times} {number.name} in writes of {megabytes} MB: {found.stopped} ended it, within "
            f"{found.longest:.2f} s; {found.old} left the old file, {found.new} the new one, "
            f"{found.hidden} a hidden one",
            flush=True,
        )
    server.close()


def writers(rounds: int) -> None:
    """Race for one name."""
    server = Server(faults=False)
    with tempfile.TemporaryDirectory() as folder:
        writers_of_one_output(server, Path(folder), rounds)
    server.close()
    print(f"{rounds} rounds of 4 writers: always one of the four files, whole")


def changes(rounds: int) -> None:
    """Change what commands are reading."""
    server = Server(faults=False)
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "work"
            folder.mkdir()
            print(f"{name}: {changed_while_read(server, folder, name, rounds)}", flush=True)
    server.close()
    print(f"{len(COMMANDS) * rounds} rounds: no signal, no mixture")


def fuzz(count: int, names: list[str]) -> None:
    """Feed the parsers; several of them each in a process of its own."""
    if len(names) != 1:
        every = names or list(Targets(Path(tempfile.mkdtemp())).all())
        command = [sys.executable, "-m", "tests.reliability", "fuzz", str(count)]
        running = [subprocess.Popen([*command, name]) for name in every]
        codes = [process.wait() for process in running]
        sys.exit(any(codes))
    finds: list[str] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        target = Targets(Path(folder)).all()[names[0]]
        seed, done = f"{time.time_ns()}", Tally()
        while done.executions < count:
            first = done.executions
            seeds = [f"{seed}-{n}" for n in range(first, min(first + BATCH, count))]
            done = done + execute(target, seeds, finds)
            print(
                f"{names[0]}: {done}, {done.seconds:.0f} s in all, {len(finds)} finds so far",
                flush=True,
            )
    for find in finds[:50]:
        print(f"  {find}")
    sys.exit(bool(finds))


def main() -> None:
    """Read the command line."""
    match sys.argv[1:]:
        case ["table"]:
            table()
        case ["faults", *names]:
            faults(names)
        case ["disk", steps]:
            disk(int(steps))
        case ["memory", steps]:
            memory(int(steps))
        case ["kills", count, megabytes]:
            kills(int(count), int(megabytes))
        case ["sizes", gigabytes]:
            sizes(int(gigabytes))
        case ["preflight", gigabytes]:
            preflight(float(gigabytes), 1)
        case ["preflight", gigabytes, repeats]:
            preflight(float(gigabytes), int(repeats))
        case ["writers", rounds]:
            writers(int(rounds))
        case ["coverage", *arguments]:
            sys.exit(branch_coverage(arguments))
        case ["changes", rounds]:
            changes(int(rounds))
        case ["fuzz", count, *names]:
            fuzz(int(count), names)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
