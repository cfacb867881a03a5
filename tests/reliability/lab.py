"""Run the real command line in child processes and look at everything it left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reliability.outputs import check_file

HERE = Path(__file__).parent

OK, INTERNAL, USAGE, BAD_INPUT, UNSAFE, INCOMPATIBLE = 0, 1, 2, 3, 4, 5
NUMERIC, OUTPUT, RESOURCE, REFUSED, CHECK = 6, 7, 8, 9, 10
INTERRUPTED, TERMINATED = 130, 143

ERROR, SIGNAL, TRUNCATE = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the ``nth`` system call on the files of the folder; 0 is none.

    ``action`` is an error (``value`` its number), a signal, or the file cut to half its size.
    """

    nth: int = 0
    action: int = 0
    value: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The surroundings of a run.

    Attributes
    ----------
    limits
        Resource limits by name: ``FSIZE``, or ``AS`` beyond what the idle child has.
    unprivileged
        Whether permissions bind the child although the tests run as root.
    writable
        Further folders it may write in.
    threads
        How many it computes with.
    copies
        How many children run the same command at once.
    kill_after, kill_with
        Seconds after which a signal is sent, and which.
    memory
        Bytes of memory it may take beyond what the idle program has.
    maps
        Whether files can be mapped into memory; on some file systems they cannot.
    patch
        ``module.function:module.Error``: a function that raises instead.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    unprivileged: bool = False
    writable: Sequence[str] = ()
    threads: int = 1
    copies: int = 1
    kill_after: float | None = None
    kill_with: int = signal.SIGKILL
    memory: int = 64 * 2**20
    maps: bool = True
    timeout: float = 60.0
    patch: str | None = None
    fault: Fault = Fault()


#: Nothing out of the ordinary.
DEFAULT = Setting()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Attributes
    ----------
    seconds, processor
        What it took by the clock, and of the processor: a busy machine makes only the first longer.
    peak
        Bytes of memory without a file behind it, beyond what the idle program has.
    whole
        The same with what the idle program has.
    bound
        What they may be.
    """

    argv: tuple[str, ...]
    codes: tuple[int, ...]
    stdout: bytes
    stderr: bytes
    seconds: float
    processor: float
    peak: int
    whole: int
    bound: int
    is_late: bool
    trace: tuple[str, ...]

    @property
    def code(self) -> int:
        """Exit code, or minus the signal that ended it."""
        return self.codes[0]

    @property
    def text(self) -> str:
        """Both streams, to show what went wrong."""
        streams = self.stdout + self.stderr
        return f"{' '.join(self.argv)[:500]} -> {self.code}\n{streams[-4000:].decode(errors='replace')}"


def compiled_faults(folder: Path) -> Path | None:
    """The library that injects faults; None where there is no C compiler."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True
    )
    return library


class Server:
    """The process that forks the children; closed with the session that started it.

    Parameters
    ----------
    faults
        Whether it can inject faults, which takes a C compiler.
    seed
        Of Python's hashes of strings: two servers with different ones iterate sets differently.
    """

    def __init__(self, *, faults: bool = True, seed: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="reliability-")
        self.scratch = Path(self._folder.name)
        library = compiled_faults(self.scratch) if faults else None
        self.injects = library is not None
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": str(seed),
            "TMPDIR": str(self.scratch),
            "COLUMNS": "120",
        }
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        line = self._process.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"the fork server did not start: {line!r}")

    def run(self, cwd: Path, argv: Sequence[object], setting: Setting = Setting()) -> Ended:
        """Run ``lycotool ARGV`` in ``cwd``."""
        names = {name: str(self.scratch / name) for name in ("stdout", "stderr", "trace")}
        Path(names["trace"]).unlink(missing_ok=True)
        request = asdict(setting) | names
        request["argv"] = [str(argument) for argument in argv]
        request["cwd"] = str(cwd.resolve())
        request["writable"] = [str(cwd), str(self.scratch), *setting.writable]
        answer = self._ask(request)
        streams = [
            b"".join(Path(f"{names[stream]}.{n}").read_bytes() for n in range(setting.copies))
            for stream in ("stdout", "stderr")
        ]
        trace = Path(names["trace"])
        return Ended(
            argv=tuple(request["argv"]),
            codes=tuple(answer["codes"]),
            stdout=streams[0],
            stderr=streams[1],
            seconds=answer["seconds"],
            processor=answer["processor"],
            peak=answer["peak"],
            whole=answer["peak"] + answer["idle"],
            bound=setting.memory,
            is_late=answer["late"],
            trace=tuple(trace.read_text().splitlines()) if trace.exists() else (),
        )

    def _ask(self, request: Mapping[str, object]) -> dict[str, object]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def mounted(self, folder: Path, kilobytes: int, *, image: Path | None = None) -> Path | None:
        """Mount a file system of some size where only the children see it.

        Parameters
        ----------
        image
            Where a disk with an ext4 is made; without, it is in memory.

        Returns
        -------
        Path or None
            The folder as they see it; None where the system lets nobody mount.
        """
        request = {
            "mount": str(folder.resolve()),
            "kilobytes": kilobytes,
            "image": None if image is None else str(image),
        }
        if not self._ask(request)["mounted"]:
            return None
        return Path(f"/proc/{self._process.pid}/root{folder.resolve()}")

    def unmount(self, folder: Path) -> None:
        """Take it away again."""
        self._ask({"unmount": str(folder.resolve())})

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()


@dataclass(frozen=True)
class Snapshot:
    """Every file, link and folder below a folder: content, mode and time of change."""

    entries: Mapping[str, tuple[object, ...]]

    @classmethod
    def of(cls, folder: Path) -> Snapshot:
        """Look at a folder now."""
        return cls({str(path.relative_to(folder)): _entry(path) for path in sorted(folder.rglob("*"))})

    def without(self, names: set[str]) -> dict[str, tuple[object, ...]]:
        """All entries but these, and what is below them."""
        return {
            name: entry
            for name, entry in self.entries.items()
            if not any(name == other or name.startswith(f"{other}/") for other in names)
        }


def _entry(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    if path.is_symlink():
        return ("link", str(path.readlink()))
    if path.is_dir():
        return ("folder", found.st_mode)
    if not path.is_file():
        return ("special", found.st_mode, found.st_rdev)
    is_sparse = found.st_size > 2**20 and found.st_blocks * 512 < found.st_size // 2
    digest = "sparse" if is_sparse else digest_of(path)
    return ("file", found.st_size, found.st_mode, found.st_mtime_ns, digest)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except PermissionError:
        return "unreadable"


#: Characters a terminal could take for commands or that hide or turn text.
_UNSAFE_TEXT = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@dataclass
class Watched:
    """One run with the state of its folder before it; asserts the invariants."""

    folder: Path
    before: Snapshot

    def check(
        self, ended: Ended, *, outputs: Sequence[str] = ("out.safetensors",), raw: bool = False
    ) -> None:
        """The invariants that hold after every run, whatever it was given.

        Parameters
        ----------
        outputs
            What a run that succeeds may have written.
        raw
            Whether standard output is a file's bytes rather than text.
        """
        assert not ended.is_late, f"hung: {ended.text}"  # I7
        assert all(code >= 0 for code in ended.codes), f"died of a signal: {ended.text}"  # I7
        assert 99 not in ended.codes, ended.text  # I5
        assert INTERNAL not in ended.codes, ended.text  # I1
        assert ended.peak <= ended.bound, f"{ended.peak} bytes of {ended.bound}: {ended.text}"  # I9
        for stream in (ended.stdout, ended.stderr):
            assert b"Traceback (most recent call last)" not in stream, ended.text  # I1
        self._check_text(ended.stderr, ended)  # I6
        if not raw:
            self._check_text(ended.stdout, ended)
        after = Snapshot.of(self.folder)
        if any(ended.codes):
            if ended.code != CHECK or ended.argv[0] != "inspect":
                assert ended.stdout == b"", ended.text
            assert after == self.before, ended.text  # I2, I3
            return
        written = set(outputs)
        assert after.without(written) == self.before.without(written), ended.text  # I2
        for name in written & after.entries.keys():
            check_file(self.folder / name, is_canonical=ended.argv[0] != "inspect")  # I4

    def _check_text(self, stream: bytes, ended: Ended) -> None:
        found = _UNSAFE_TEXT.search(stream.decode("utf-8"))
        assert found is None, f"{found!r} on the terminal: {ended.text}"


def watched(folder: Path) -> Watched:
    """Remember what is in a folder."""
    return Watched(folder, Snapshot.of(folder))
