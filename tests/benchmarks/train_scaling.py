"""Time of a training step on one GPU and on several, by hand.

    python tests/benchmarks/train_scaling.py [--gpus 2] [--family sdxl] [--algo lora full] [--batch 2] [--steps 60]
        [--device cuda] [--micro] [--json FILE]

Builds SDXL (1024x1024) or SD 1.5 (512x512) from their published configs with random weights and trains through the loop
that users run, with the batch of each GPU fixed: `scaling` is how many times as many images a second several GPUs train.
Times are between fetches of losses, every ten steps, without the first twenty. The processes are started by
`torch.distributed.run`. Also printed: the bytes of the one transfer of a step.

``--micro --device cpu`` shows in a minute that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
# ruff: noqa: E402

import torch
from train_real_size import LEARNING_RATES, NETWORK, SIDES, Nothing, pictures, random_base

from lycotool.distributed import World, joined
from lycotool.training import config
from lycotool.training.assemble import make_run
from lycotool.training.loop import train
from lycotool.training.observe import Observer, StepRecord
from lycotool.training.setup import prepare

#: Steps left out, and between two fetches.
WARM_UP, EVERY = 20, 10


class Clock(Observer):
    """Notes when the losses of which steps were fetched."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}
        self.finite = True

    def step(self, record: StepRecord) -> None:
        self.times[record.step] = time.perf_counter()
        self.finite &= record.loss == record.loss


def measure(world: World, images: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each algorithm, in this process of ``world``."""
    family, device = arguments.family, world.device
    side = 128 if arguments.micro else SIDES[family]
    precision = "bf16" if device.type == "cuda" else "fp32"
    torch.manual_seed(0)  # the same weights in all processes
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = random_base(family, device, dtype, micro=arguments.micro)
    found: dict[str, Any] = {}
    for algo in arguments.algo:
        values = {
            "base": family, "dataset": str(images), "resolution": (side, side), "batch_size": arguments.batch,
            "algo": algo, **NETWORK[algo], "train_te": False, "steps": arguments.steps, "log_every": EVERY,
            "lr": LEARNING_RATES.get(algo, 2e-4), "precision": precision, "device": arguments.device,
            "min_bucket_reso": min(256, side), "bucket_reso_steps": 8 if side < 256 else 64,
        }  # fmt: skip
        ready = prepare(config.build(values), load_weights=lambda path: {}, base=base, world=world)
        run, clock = make_run(ready, Observer()), Clock()
        try:
            train(run, Nothing(), clock)
        finally:
            ready.network.detach()
        first, last = min(WARM_UP, arguments.steps // 2 // EVERY * EVERY or 1), arguments.steps
        found[algo] = {
            "seconds": (clock.times[last] - clock.times[first]) / (last - first),
            "reduced_bytes": sum(4 * gradient.numel() for gradient in run.stepper.gradients),
            "finite": clock.finite,
        }
        del run, ready
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def work(images: Path, arguments: argparse.Namespace) -> None:
    """One of the processes: rank 0 prints what it measured."""
    with joined(arguments.device) as world:
        found = measure(world, images, arguments)
        if world.is_main:
            print("measured: " + json.dumps(found), flush=True)


def started(count: int, images: Path) -> dict[str, Any]:
    """What ``count`` processes measure."""
    script = [str(Path(__file__).resolve()), *sys.argv[1:], "--images", str(images)]
    engine = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *engine, *script],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("measured: "))
    found: dict[str, Any] = json.loads(line.removeprefix("measured: "))
    return found


def main() -> None:
    """Measure one process and several, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--family", default="sdxl", choices=list(SIDES))
    parser.add_argument("--algo", nargs="+", default=["lora"], choices=list(NETWORK))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--micro", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)  # of the processes that are started
    arguments = parser.parse_args()
    if arguments.steps % EVERY:
        parser.error(f"--steps is a multiple of {EVERY}")
    if arguments.images is not None:
        work(arguments.images, arguments)
        return
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print(f"torch {torch.__version__}, {name}, {arguments.family}, {arguments.batch} images each")
    side = 128 if arguments.micro else SIDES[arguments.family]
    with tempfile.TemporaryDirectory() as folder:
        images = pictures(Path(folder) / "images", side, arguments.batch * arguments.gpus)
        results = {count: started(count, images) for count in (1, arguments.gpus)}
    print(f"{'algo':<5} {'GPUs':>5} {'s/step':>8} {'images/s':>9} {'scaling':>8} {'reduced':>12}")
    for algo in arguments.algo:
        alone = results[1][algo]["seconds"]
        for count, found in results.items():
            seconds = found[algo]["seconds"]
            print(
                f"{algo:<5} {count:>5} {seconds:>8.4f} {count * arguments.batch / seconds:>9.2f} "
                f"{count * alone / seconds:>8.3f} {found[algo]['reduced_bytes'] if count > 1 else 0:>12,}"
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
