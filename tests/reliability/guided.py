"""The fuzzer's targets with inputs chosen by the code they reach; needs atheris.

::

    pip install atheris
    python -m tests.reliability.guided TARGET -runs=1000000 [FOLDER]
    python -m tests.reliability.guided TARGET --keep FOLDER

``all`` is every target in turn. What follows the target is libFuzzer's, for each of them; a folder
keeps what it finds. It starts from what
:mod:`reliability.corpus` keeps, and ``--keep`` puts what a folder has there. Every second input is one of :mod:`reliability.fuzz`, whose
choices are read from the bytes instead of a generator; the others are the bytes themselves.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability import corpus


class Choices(random.Random):
    """Draws what the bytes say, and zeros after their end."""

    def __new__(cls, data: bytes) -> Choices:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._bits, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def getrandbits(self, count: int) -> int:
        """The next bits; zeros always fit, so that whoever draws until something fits comes to an end."""
        drawn = self._bits & ((1 << count) - 1)
        self._bits >>= count
        return drawn

    def random(self) -> float:
        """A share of 1, by the next 16 bits."""
        return self.getrandbits(16) / 2**16


def bare(fuzz: ModuleType, targets: object, name: str, data: bytes) -> None:
    """The bytes as they are, for the parsers that take bytes or text."""
    match name:
        case "header":
            fuzz.agrees_with_the_reference(data)
        case "report":
            targets.report_of(data)
        case "terminal":
            fuzz.check_clean(data.decode("utf-8", "replace"))
        case "index":
            targets.index_of(data)
        case "dataset":
            targets.dataset_of(data)
        case "recipe":
            targets.recipe_of(data)
        case "configuration":
            targets.configuration_of(data)
        case _:
            fuzz.check_names(data.decode("utf-8", "replace").split("\n"))


def execute(fuzz: ModuleType, targets: object, name: str, data: bytes) -> None:
    """One input: choices of what :mod:`reliability.fuzz` makes, or the bytes themselves."""
    if data[:1] < b"\x80":
        targets.all()[name](Choices(data[1:]))
    else:
        bare(fuzz, targets, name, data[1:])


#: Executions after which the figures so far are printed.
BATCH = 25_000

#: Random bytes of a seed whose choices they are.
_CHOICES = (64, 256, 1024, 4096)


def instrumented() -> ModuleType:
    """The fuzzer's targets, with every branch of lycotool told to libFuzzer.

    What the program imports only when it is used is imported here, or its branches would go uncounted.
    """
    import atheris

    with atheris.instrument_imports(include=["lycotool"]):
        import lycotool

        for module in pkgutil.walk_packages(lycotool.__path__, "lycotool."):
            if not module.name.endswith("__main__") and ".kernels" not in module.name:
                importlib.import_module(module.name)
        from reliability import fuzz
    return fuzz


def plant(fuzz: ModuleType, name: str, folder: Path) -> None:
    """What a run starts from: the inputs that are kept, choices of some length, and sound inputs."""
    draw = random.Random(name)
    for number, data in enumerate(corpus.kept(name)):
        (folder / f"kept-{number}").write_bytes(data)
    for size in _CHOICES:
        for n in range(8):
            (folder / f"choices-{size}-{n}").write_bytes(b"\x00" + draw.randbytes(size))
    texts = {"index": fuzz.INDEX, "dataset": fuzz.TOML, "recipe": fuzz.RECIPE, "configuration": fuzz.CONFIG}
    for n in range(8):
        match name:
            case "header" | "report" | "measured":
                sound = fuzz.container(draw)
            case "terminal":
                sound = fuzz.text(draw).encode()
            case "dialects":
                sound = "\n".join(
                    f"{m}.{e}" for m in fuzz.MODULES for e in draw.sample(fuzz.ENDINGS, 3)
                ).encode()
            case _:
                sound = texts[name]
        (folder / f"sound-{n}").write_bytes(b"\xff" + sound)


def dictionary(fuzz: ModuleType, file: Path) -> None:
    """Words that one seldom comes by a byte at a time."""
    words = [
        *fuzz.TOKENS,
        *(f'"{dtype}"'.encode() for dtype in fuzz.DTYPE_BITS),
        *(e.encode() for e in fuzz.ENDINGS),
    ]
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in words if len(word) < 100)
    file.write_text("".join(f'"{word}"\n' for word in escaped))


def run(fuzz: ModuleType, name: str, options: list[str], folder: Path) -> None:
    """Run one target until libFuzzer has had enough, which ends the process."""
    import atheris

    targets = fuzz.Targets(folder)
    seeds, words = folder / "seeds", folder / "words"
    seeds.mkdir()
    plant(fuzz, name, seeds)
    dictionary(fuzz, words)
    tally, before = fuzz.Tally(), fuzz.memory()

    def once(data: bytes) -> None:
        start = time.process_time()
        try:
            execute(fuzz, targets, name, data)
            tally.accepted += 1
        except fuzz.LycotoolError:
            tally.refused += 1
        took = time.process_time() - start
        tally.longest = max(tally.longest, took)
        tally.executions += 1
        if tally.executions % BATCH == 0:
            tally.grown = fuzz.memory() - before
            print(f"{name}: {tally}", flush=True)
        assert took < fuzz.LONGEST, f"{took:.1f} s"

    # Python and torch take about 400 MB; what comes on top is the bound.
    limit = f"-rss_limit_mb={512 + fuzz.MOST_MEMORY // 2**20}"
    fixed = [limit, "-timeout=60", "-max_len=8192", "-print_final_stats=1", f"-dict={words}"]
    # libFuzzer keeps what it finds in the first folder and only reads the others.
    has_corpus = any(not option.startswith("-") for option in options)
    atheris.Setup([sys.argv[0], *fixed, *options, *([] if has_corpus else [str(seeds)]), str(seeds)], once)
    atheris.Fuzz()


def main(name: str, options: list[str]) -> int:
    """Run a target, or all of them one after the other; each in a process of its own."""
    fuzz = instrumented()  # takes longer than all else that happens before the first execution
    folders = [option for option in options if not option.startswith("-")]
    failed = 0
    for one in fuzz.NAMES if name == "all" else [name]:
        own = [option for option in options if option not in folders]
        for folder in folders:
            place = Path(folder) / one if name == "all" else Path(folder)
            place.mkdir(parents=True, exist_ok=True)
            own.append(str(place))
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            process = os.fork()
            if process == 0:
                try:
                    run(fuzz, one, own, Path(scratch))
                finally:
                    os._exit(1)  # libFuzzer ends it before, unless it could not begin
            failed |= os.waitpid(process, 0)[1]
    return int(failed != 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[2:3] == ["--keep"]:
        found = (path.read_bytes() for folder in sys.argv[3:] for path in Path(folder).iterdir())
        print("kept {} of {}".format(*corpus.keep(sys.argv[1], found)))
        sys.exit()
    sys.exit(main(sys.argv[1], sys.argv[2:]))
