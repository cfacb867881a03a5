"""The fuzzer's targets with inputs chosen by the code they reach; needs atheris.

::

    pip install atheris
    python -m tests.reliability.guided TARGET -runs=1000000 [CORPUS]

What follows the target is libFuzzer's. Every second input is one of :mod:`reliability.fuzz`, whose
choices are read from the bytes instead of a generator; the others are the bytes themselves.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))


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


def main(name: str, options: list[str]) -> None:
    """Run one target until libFuzzer has had enough."""
    import atheris

    with atheris.instrument_imports(include=["lycotool"]):
        from lycotool.errors import LycotoolError
        from reliability import fuzz

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        targets = fuzz.Targets(Path(folder))
        target = targets.all()[name]

        def once(data: bytes) -> None:
            start = time.process_time()
            try:
                if data[:1] < b"\x80":
                    target(Choices(data[1:]))
                else:
                    bare(fuzz, targets, name, data[1:])
            except LycotoolError:
                pass
            took = time.process_time() - start
            assert took < fuzz.LONGEST, f"{took:.1f} s"

        # Python and torch take about 400 MB; what comes on top is the bound.
        limit = f"-rss_limit_mb={512 + fuzz.MOST_MEMORY // 2**20}"
        atheris.Setup([sys.argv[0], limit, "-timeout=60", *options], once)
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
