"""Training within 4 and 8 GiB of a GPU, estimated and measured: by hand, on a GPU.

    python tests/benchmarks/train_memory.py [--case sd1-4 sdxl-8 …] [--steps 12] [--json FILE] [--micro]

Builds SD 1.5 (512x512) and SDXL (1024x1024) from their published configs with random weights in the machine's memory,
lets the process have a share of the GPU only (``torch.cuda.set_per_process_memory_fraction``), and trains a LoRA of rank
16 on every linear and convolution layer of the UNet through the loop that users run: the images are encoded within the
same limit, every case in a process of its own; gradient checkpointing is what `lycotool train` chooses for it, and the first steps are recorded as a CUDA
graph. Prints what was estimated and the most that torch's allocator held: tensors, and what it reserved for them. The
limit is of what torch reserves; the CUDA context of the process, about half a GiB, comes on top of it.

Random weights: the numbers are memory and time, the loss means nothing. ``--micro`` shrinks the models, on the CPU, to
see that the script works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this copy, wherever the script is started
# ruff: noqa: E402

from lycotool.training import config
from lycotool.training.assemble import make_run
from lycotool.training.loop import train
from lycotool.training.memory.choice import choose_memory
from lycotool.training.observe import Observer
from lycotool.training.setup import prepare
from tests.benchmarks.train_real_size import NETWORK, SIDES, Clock, Nothing, pictures, random_base

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A training and the GiB it may have; None for all there are."""

    family: str
    limit: float | None
    algo: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "sd1-4": Case("sd1", 4),
    "sd1-3": Case("sd1", 3),
    "sd1-4-batch4": Case("sd1", 4, options={"batch_size": 4}),
    "sdxl-8": Case("sdxl", 8),
    "sdxl-8-batch2": Case("sdxl", 8, options={"batch_size": 2}),
    "sdxl-6-fp8": Case("sdxl", 6, options={"base_dtype": "fp8"}),
    "sdxl": Case("sdxl", None),
    "sdxl-checkpointed": Case("sdxl", None, options={"gradient_checkpointing": True}),
    "sdxl-fp8": Case("sdxl", None, options={"base_dtype": "fp8"}),
}
USUAL = ["sd1-4", "sd1-3", "sdxl-8", "sdxl-8-batch2", "sdxl-6-fp8", "sdxl"]


class Told(Clock):
    """Also prints what a run says."""

    def warning(self, text: str) -> None:
        print(f"  warning: {text}", flush=True)

    note = warning


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Estimate and measure one case; the machine's state is as before afterwards."""
    case = CASES[name]
    device = torch.device("cpu" if arguments.micro else "cuda:0")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    base = random_base(case.family, device, torch.bfloat16, micro=arguments.micro)
    for network in (base.unet, base.vae, *base.text_encoders):
        network.to("cpu")  # they come when they are needed
    if cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            1.0 if case.limit is None else min(1.0, case.limit * GIB / total), device
        )
        torch.cuda.reset_peak_memory_stats(device)
    side = 128 if arguments.micro else SIDES[case.family]
    with tempfile.TemporaryDirectory() as folder:
        images = pictures(Path(folder) / "images", side, 4)
        values = {
            "base": case.family, "dataset": str(images), "resolution": (side, side), "algo": case.algo,
            **NETWORK[case.algo], "train_te": False, "steps": arguments.steps, "log_every": 1, "lr": 2e-4,
            "precision": "bf16", "device": str(device), "min_bucket_reso": min(256, side),
            "bucket_reso_steps": 8 if side < 256 else 64, "batch_size": 1, **case.options,
        }  # fmt: skip
        began = time.perf_counter()
        ready = prepare(config.build(values), load_weights=lambda path: {}, base=base)
        available = None if cuda else int((case.limit or 1000) * GIB)
        choice = choose_memory(ready, available=available)
        estimated_in = time.perf_counter() - began
        for line in (*ready.notes, choice.reason, choice.warning):
            if line:
                print(f"  {line}", flush=True)
        clock = Told()
        run = make_run(choice.ready, Observer())
        before = _peaks(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            train(run, Nothing(), clock)
        finally:
            ready.network.detach()
    seconds = [b - a for a, b in itertools.pairwise(list(clock.times.values())[5:])]
    held, reserved = _peaks(device)
    found = {
        "case": name, "limit_gib": case.limit, "checkpointing": choice.estimate.gradient_checkpointing,
        "estimated_gib": choice.estimate.total / GIB, "estimate_seconds": estimated_in,
        "measured_gib": held / GIB, "reserved_gib": reserved / GIB,
        "estimated_encoding_gib": choice.estimate.encoding / GIB, "measured_encoding_gib": before[0] / GIB,
        "seconds": statistics.median(seconds) if seconds else None,
        "finite": all(record.loss == record.loss for record in clock.records),
    }  # fmt: skip
    del run, ready, choice, base
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def _peaks(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one case where none was measured before, whose memory might be there still."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [
            sys.executable,
            __file__,
            "--case",
            name,
            "--steps",
            str(arguments.steps),
            "--json",
            str(file),
        ]
        subprocess.run([*command, *(["--micro"] if arguments.micro else [])], check=True)
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found[0]


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", default=USUAL, choices=list(CASES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    where = "CPU, micro" if arguments.micro else torch.cuda.get_device_name(0)
    print(f"torch {torch.__version__}, {where}, bf16, {arguments.steps} steps")
    results = []
    if len(arguments.case) > 1:
        results = [_in_a_process(name, arguments) for name in arguments.case]
    for name in arguments.case if not results else ():
        print(name, flush=True)
        try:
            found = measure(name, arguments)
        except torch.OutOfMemoryError as error:
            print(f"  out of memory: {str(error).splitlines()[0]}", flush=True)
            results.append({"case": name, "error": "out of memory"})
            gc.collect()
            torch.cuda.empty_cache()
            continue
        results.append(found)
        error = found["estimated_gib"] / found["measured_gib"] - 1 if found["measured_gib"] else float("nan")
        print(
            f"  estimated {found['estimated_gib']:.2f} GiB, measured {found['measured_gib']:.2f} ({error:+.1%}), "
            f"reserved {found['reserved_gib']:.2f}; while encoding {found['estimated_encoding_gib']:.2f} and "
            f"{found['measured_encoding_gib']:.2f}; checkpointing {found['checkpointing']}, "
            f"{found['seconds']} s a step; planned in {found['estimate_seconds']:.1f} s",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
