"""Branches of the code that reads strangers' files and writes outputs, and those that no test takes.

The floor is all of them, reached in one process by the tests of these modules and the fuzzer's short
share. What ``pyproject.toml`` names is measured; a line that is left out says there why it cannot run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

TESTS = ("tests/io", "tests/reliability/test_fuzz.py")


def branch_coverage(arguments: Sequence[str] = ()) -> int:
    """Run the tests, or what pytest is given instead, and print the table; its exit code.

    Processes that the tests start are measured too.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "COVERAGE_FILE": str(Path(folder) / "data")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

        def coverage(*words: str) -> int:
            return subprocess.run(
                [sys.executable, "-m", "coverage", *words], cwd=ROOT, env=environment, check=False
            ).returncode

        tests = ["-n", "0", "-q", *(arguments or TESTS)]
        failed = coverage("run", "-m", "pytest", *tests)
        return failed or coverage("combine", "-q") or coverage("report")
