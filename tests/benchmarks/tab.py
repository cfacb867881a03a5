"""What a TAB costs beside an empty program of the same libraries: ``python tests/benchmarks/tab.py``.

The yardstick is ``python -c 'import typer, rich.table'``; the demand is at most 1.8 times that.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "completions" / "lycotool.bash"
TAB = f"source '{SCRIPT}'; COMP_WORDS=(lycotool merge --method ti); COMP_CWORD=3; _lycotool; echo ${{COMPREPLY[@]}}"


def seconds(command: list[str], runs: int = 15) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    yardstick = seconds([sys.executable, "-c", "import typer, rich.table"])
    tab = seconds(["bash", "--norc", "-c", TAB])
    print(f"python -c 'import typer, rich.table'  {yardstick * 1000:7.1f} ms")
    print(f"bash, reading the script, one TAB     {tab * 1000:7.1f} ms  {tab / yardstick:.2f} of it")
