"""Every file operation beside its yardsticks, in the same run.

    python -m tests.benchmarks [--device cuda] [--quick] [--only NAME …] [--json FILE] [--markdown FILE]

Makes checkpoints and adapters of real widths with random numbers in a folder that is removed at the
end (40 GB of disk at most; ``--quick``: an eighth of the width, 3 GB), runs each operation and its
yardsticks in turn, and prints a table: medians, ratios within the same rounds, and how much of the
limit was used. Whole processes are timed, and everything that writes flushes to disk before its
clock stops. What needs a library that is not installed says so instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the tests

from benchmarks.cases import CASES, Case, Settings
from benchmarks.measure import ROOT, Run, environment, floor, run
from benchmarks.results import Outcome, document, markdown, outcome, show


def machine(settings: Settings) -> dict[str, object]:
    """What the figures are of."""
    said: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "processors": os.cpu_count(),
        "usable processors": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "load before": os.getloadavg()[0],
        "quick": settings.quick,
        "rss floor": floor(),
    }
    code = "import torch; print(torch.__version__)"
    if settings.device != "cpu":
        code += f"; print(torch.cuda.get_device_name({settings.device!r}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said["torch"], *rest = told.stdout.splitlines()
    if rest:
        said["gpu"] = rest[0]
    return said


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "")


def make(case: Case, folder: Path) -> None:
    """Make the inputs that are not there yet.

    Raises
    ------
    SystemExit
        If one cannot be made.
    """
    for path, command in case.inputs.items():
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            run(command, folder=folder)


def remove(path: Path | None) -> None:
    """Remove an output."""
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)


def measure(
    case: Case, folder: Path, rounds: int | None, budget: float
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Every command once per round, so that a busy minute of the machine hits all of them; and what failed."""
    failed: dict[str, str] = {}
    runs: dict[str, list[Run]] = {command.name: [] for command in case.commands}
    start = time.perf_counter()
    for number in range(rounds or case.rounds):
        began = time.perf_counter()
        for command in case.commands:
            if (command.once and number) or command.name in failed:
                continue
            remove(command.output)
            try:
                runs[command.name].append(run(command.argv, folder=folder, gpu=command.gpu))
            except SystemExit as error:
                if not command.optional:
                    raise
                failed[command.name] = str(error).strip().splitlines()[-1]
            remove(command.output)
        now = time.perf_counter()
        if rounds is None and number and now - start + (now - began) > budget:
            break  # another round would take too long
        if rounds is None and not number and now - start > budget:
            break
    return runs, failed


def carry_out(case: Case, folder: Path, rounds: int | None, budget: float) -> Outcome:
    """Make, check, measure."""
    make(case, folder)
    checks: dict[str, object] = {}
    for name, commands in case.checks.items():
        for command in commands[:-1]:
            run(command, folder=folder)
        checks[name] = run(commands[-1], folder=folder, answers=True).answer
        for left in {command.output for command in case.commands}:
            remove(left)
        remove(folder / "kept.safetensors")
    runs, failed = measure(case, folder, rounds, budget)
    case = replace(
        case,
        commands=[command for command in case.commands if command.name not in failed],
        absent={**case.absent, **{name: f"it failed: {why}" for name, why in failed.items()}},
    )
    alone = {name: run(command, folder=folder, answers=True).answer for name, command in case.alone.items()}
    return outcome(case, runs, alone, checks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases and print and save their table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]; bake is measured on both")
    parser.add_argument("--quick", action="store_true", help="small widths, one round: under two minutes")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME",
                        help=f"some cases: {' '.join(CASES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="of every case; else as many as the budget allows")
    parser.add_argument(
        "--budget", type=float, default=50.0, help="seconds after which a case gets no more rounds"
    )
    parser.add_argument("--gb", type=float, default=8.0, help="the largest sharded checkpoint, decimal GB")
    parser.add_argument("--no-checks", action="store_true", help="compare no results before timing")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="lycotool-benchmark-", dir=options.folder)).resolve()
    settings = Settings(folder, options.device, options.quick, options.gb)
    outcomes: list[Outcome] = []
    failed: list[str] = []
    rounds = options.rounds or (1 if options.quick else None)
    try:
        _compile(folder)
        about = machine(settings)
        print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
        for name in options.only:
            case = CASES[name](settings)
            if options.no_checks:
                case = _without_checks(case)
            try:
                outcomes.append(carry_out(case, folder, rounds, options.budget))
            except SystemExit as error:  # the other cases are worth having
                failed.append(f"{name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            show(outcomes[-1])
            _save(options, outcomes, about)  # what is measured is not lost if a later case fails
    finally:
        shutil.rmtree(folder)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def _without_checks(case: Case) -> Case:
    return replace(case, checks={})


def _save(options: argparse.Namespace, outcomes: Sequence[Outcome], about: Mapping[str, object]) -> None:
    if options.json:
        options.json.write_text(json.dumps(document(outcomes, about), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(outcomes))


def _compile(folder: Path) -> None:
    """Have the program compiled, as an installed one is."""
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", str(ROOT / "lycotool")], env=environment(), check=True
    )


if __name__ == "__main__":
    main()
