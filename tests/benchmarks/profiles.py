"""Where the time of a command goes, by stages: samples of all its threads, taken by py-spy.

    python -m tests.benchmarks.profiles [--rate 100] inspect FILE --json
    python -m tests.benchmarks.profiles bake CHECKPOINT ADAPTER -o OUT.safetensors --device cpu

Prints the share of each stage in the samples of threads that were at work, and the functions with
most of them. ``pip install py-spy`` first; the command is run as it is, so it needs an output that
does not exist.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: A stage, and what the innermost of lycotool's frames that tells it looks like. First match wins.
STAGES: tuple[tuple[str, str], ...] = (
    ("hashing", r"io/(passing|hashes)\.py|_sha256"),
    ("writing", r"io/(writer|nameless|whole|shards|tree|kernel|rewrite)\.py"),
    ("reading", r"io/(store|prefetch)\.py|_read_ahead\.py"),
    (
        "headers and names",
        r"io/(header|open)\.py|formats/|models/|_adapter\.py|_inspect_|detection\.py|_plan\.py",
    ),
    ("computing", r"linalg/|algorithms/|ops/"),
    ("command line and report", r"cli/"),
)

#: A thread that waits for work, which the sampler can take for one that works.
_WAITING = re.compile(r"^(_worker|wait|acquire|result|_wait_for_tstate_lock) ")


def stage_of(frames: list[str]) -> str | None:
    """The stage a stack is in, outermost frame first; None for a thread that waits."""
    if not frames or _WAITING.match(frames[-1]):
        return None
    if any("_find_and_load" in frame for frame in frames):
        return (
            "import torch"
            if any("/torch/" in frame or " (torch/" in frame for frame in frames)
            else "imports"
        )
    for frame in reversed(frames):
        if "lycotool/" in frame:
            for stage, pattern in STAGES:
                if re.search(pattern, frame):
                    return stage
    return "other"


def main() -> None:
    """Run the command under the sampler and print two tables."""
    arguments = sys.argv[1:]
    rate = "100"
    if arguments[:1] == ["--rate"]:
        rate, arguments = arguments[1], arguments[2:]
    stages: Counter[str] = Counter()
    places: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "stacks.txt"
        sampler = ["py-spy", "record", "-r", rate, "-t", "-f", "raw", "-o", str(raw), "--"]
        command = [sys.executable, "-m", "lycotool", *arguments]
        subprocess.run([*sampler, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        for line in raw.read_text().splitlines():
            stack, count = line.rsplit(" ", 1)
            frames = stack.split(";")[1:]  # the first is the thread
            stage = stage_of(frames)
            if stage is not None:
                stages[stage] += int(count)
                inside = [frame for frame in frames if "lycotool/" in frame]
                places[f"{stage}: {inside[-1] if inside else frames[-1]}"] += int(count)
    total = sum(stages.values())
    for found in (stages, places):
        for name, count in found.most_common(12):
            print(f"{100 * count / total:5.1f} %  {name}")
        print()


if __name__ == "__main__":
    main()
