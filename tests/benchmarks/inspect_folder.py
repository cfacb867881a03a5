"""Time of `lycotool inspect FOLDER` over many adapters, by hand.

    python tests/benchmarks/inspect_folder.py [--files 1000] [--networks 100] [--rounds 3] [--folder DIR] [--json FILE]

Each file is a LoRA over 333 layers of SDXL's UNet and has 999 tensors under sd-scripts' names,
alphas and metadata of its own; the data section is a hole, so that the files take no room. There are
``--networks`` of them with different ranks, because the files of a folder are often epochs of one
training or were trained with one setting, and `inspect` parses like headers once; ``--networks`` equal to
``--files`` is the worst case. Whole
processes are timed, from the start of Python to its end: `lycotool inspect`, the same with
`--json`, the header alone read and parsed by `json.loads` (what no reader can do without), and
`safetensors.safe_open` asked for the shape of every tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import layers

ROOT = Path(__file__).resolve().parents[2]
MODULES = 333

HEADERS_ALONE = """
import json, struct, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).rglob("*.safetensors")):
    with path.open("rb") as file:
        json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
"""

SAFE_OPEN = """
import sys
from pathlib import Path
from safetensors import safe_open
for path in sorted(Path(sys.argv[1]).rglob("*.safetensors")):
    with safe_open(path, "np") as file:
        file.metadata()
        for name in file.keys():
            file.get_slice(name).get_shape()
"""


def write_folder(folder: Path, files: int, networks: int) -> None:
    """Adapters whose headers are whole and whose data is a hole."""
    shapes = list(layers("sdxl").items())[:MODULES]
    for number in range(files):
        network = number % networks
        document: dict[str, object] = {
            "__metadata__": {"ss_network_module": "networks.lora", "ss_network_dim": "Dynamic",
                             "ss_network_alpha": "8.0", "ss_output_name": f"style {number}",
                             "ss_base_model_version": "sdxl_base_v1-0"},
        }  # fmt: skip
        position = 0
        for index, (path, shape) in enumerate(shapes):
            rank = 4 + network % 61 + (index % 7 == network // 61)
            name = "lora_unet_" + path.removeprefix("lora_unet.").replace(".", "_")
            ones = [1] * (len(shape) - 2)
            for slot, sizes in (
                ("alpha", []),
                ("lora_down.weight", [rank, *shape[1:]]),
                ("lora_up.weight", [shape[0], rank, *ones]),
            ):
                count = 2
                for size in sizes:
                    count *= size
                document[f"{name}.{slot}"] = {
                    "dtype": "F16", "shape": sizes, "data_offsets": [position, position + count],
                }  # fmt: skip
                position += count
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"{number:04}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak KiB of a process that has to succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}")
    return seconds, usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made, in a folder that is removed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="inspect-folder-", dir=arguments.folder))
    try:
        write_folder(folder, arguments.files, min(arguments.networks, arguments.files))
        python = [sys.executable]
        commands = {
            "lycotool inspect": [*python, "-m", "lycotool", "inspect", str(folder)],
            "lycotool inspect --json": [*python, "-m", "lycotool", "inspect", str(folder), "--json"],
            "json.loads of the headers": [*python, "-c", HEADERS_ALONE, str(folder)],
            "safetensors.safe_open": [*python, "-c", SAFE_OPEN, str(folder)],
        }
        taken: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                taken[name].append(timed(command))
    finally:
        shutil.rmtree(folder)
    print(
        f"{arguments.files} files of {3 * MODULES} tensors, {arguments.networks} networks, {arguments.rounds} rounds"
    )
    print(f"{'':28} {'median s':>9} {'least s':>9} {'ms/file':>9} {'MiB':>7}")
    figures = {}
    for name, runs in taken.items():
        seconds = [run[0] for run in runs]
        median = statistics.median(seconds)
        peak = max(run[1] for run in runs) / 1024
        figures[name] = {"median_s": median, "least_s": min(seconds), "peak_mib": peak}
        print(
            f"{name:28} {median:9.2f} {min(seconds):9.2f} {1000 * median / arguments.files:9.2f} {peak:7.0f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
