"""Time, memory and error of `lycotool extract` on a UNet of real width, by hand.

    python tests/benchmarks/extract_real_width.py [--model sdxl] [--device cuda] [--rank 64]
        [--folder DIR] [--json FILE] [--layers N] [--profile]

Two fp16 checkpoints with the UNet's linear and convolution layers are made: random weights,
and the same plus a difference that fine-tuning might leave, a few strong directions and a
flat tail. Yardsticks in the same rounds: reading both files' bytes in one thread, and
`import torch`, which the command's time contains. Then the same work inside a process that
has imported torch and used the device already. The error of a sample of layers, stored in
fp32, is compared with the optimum, from a float64 SVD of what the files really differ by.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import layers

ROOT = Path(__file__).resolve().parents[2]


def make(shapes: dict[str, tuple[int, ...]], folder: Path, device: str) -> tuple[Path, Path]:
    """Write both checkpoints, one layer at a time."""
    sys.path.insert(0, str(ROOT))
    from lycotool.io.writer import FilePlan, TensorPlan, write_file

    plans = {
        f"model.diffusion_model.{name}.weight": TensorPlan("F16", shape) for name, shape in shapes.items()
    }
    plan = FilePlan(plans, {"format": "pt"})
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for index, path in enumerate(paths):

        def produce(key: str, index: int = index) -> list[memoryview]:
            shape = plans[key].shape
            rows, columns = shape[0], torch.Size(shape[1:]).numel()
            generator = torch.Generator(device).manual_seed(hash_of(key))

            def normal(*size: int) -> torch.Tensor:
                return torch.randn(*size, generator=generator, device=device)

            weight = normal(rows, columns) * 0.03
            if index:
                strong = normal(rows, 24) @ normal(24, columns) * 2e-4
                weight += strong + normal(rows, columns) * 5e-4
            data = weight.half().cpu().contiguous().view(torch.uint8).numpy()
            return [data.reshape(-1).data]

        write_file(path, plan, produce)
    return paths


def hash_of(key: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(key.encode()[-7:], "little")


def read_all(paths: tuple[Path, Path]) -> float:
    """Seconds to read the bytes of both files."""
    start = time.perf_counter()
    buffer = bytearray(2**24)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def timed(command: list[str]) -> tuple[float, str]:
    """Wall seconds and standard output of a child process."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def in_process(
    paths: tuple[Path, Path], output: Path, rank: int, device: str, rounds: int, profile: bool
) -> list[float]:
    """Seconds of the whole operation, files to file, where torch is warm already."""
    from lycotool.ops.extract import ExtractOptions, extract

    options = ExtractOptions(output=str(output), rank=rank, device=device, force=True)
    walls = []
    for _ in range(rounds + 1):
        output.unlink(missing_ok=True)
        start = time.perf_counter()
        extract(str(paths[0]), str(paths[1]), options)
        walls.append(time.perf_counter() - start)
    if profile:
        with cProfile.Profile() as profiler:
            extract(str(paths[0]), str(paths[1]), options)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return walls[1:]


def ratios_to_optimum(
    paths: tuple[Path, Path], adapter: Path, rank: int, count: int, device: str
) -> list[float]:
    """Error of a sample of layers over the best error of that rank."""
    from safetensors import safe_open

    files = [safe_open(path, "pt", device=device) for path in (*paths, adapter)]
    keys, stored = list(files[0].keys()), list(files[2].keys())
    modules = sorted(k.removesuffix(".lora_up.weight") for k in stored if k.endswith("lora_up.weight"))
    prefix = "model.diffusion_model."
    layers = {
        "lora_unet_" + k.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): k for k in keys
    }
    found = []
    for module in modules[:: max(1, len(modules) // count)]:
        one, two = (file.get_tensor(layers[module]).double().flatten(1) for file in files[:2])
        up, down = (
            files[2].get_tensor(f"{module}.lora_{side}.weight").double().flatten(1) for side in ("up", "down")
        )
        values = torch.linalg.svdvals(two - one)
        if len(values) <= rank:
            continue  # nothing is left of a layer that small
        best = values[rank:].square().sum().sqrt()
        found.append(float((two - one - up @ down).norm() / best))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["sd15", "sdxl"], default="sdxl")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unet = {
        path.removeprefix("lora_unet."): shape
        for path, shape in layers(options.model).items()
        if path.startswith("lora_unet.")
    }
    shapes = dict(list(unet.items())[: options.layers])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = make(shapes, Path(folder), options.device)
        output = Path(folder) / "out.safetensors"
        command = [sys.executable, "-m", "lycotool", "extract", *map(str, paths), "--rank", str(options.rank),
                   "--device", options.device, "-f", "-q", "-o", str(output)]  # fmt: skip
        reads, walls, imports = [], [], []
        for _ in range(options.rounds):
            reads.append(read_all(paths))
            output.unlink(missing_ok=True)  # deleting an old file is not part of writing one
            imports.append(timed([sys.executable, "-c", "import torch; torch.zeros(1)"])[0])
            walls.append(timed(command)[0])
        inside = in_process(paths, output, options.rank, options.device, options.rounds, options.profile)
        timed([*command, "--dtype", "fp32"])
        ratios = ratios_to_optimum(paths, output, options.rank, options.sample, options.device)
        wall, read, start = (statistics.median(values) for values in (walls, reads, imports))
        figures = {
            "device": torch.cuda.get_device_name()
            if options.device != "cpu"
            else f"cpu, {os.cpu_count()} cores",
            "layers": len(shapes),
            "checkpoint_bytes": paths[0].stat().st_size,
            "rank": options.rank,
            "read_both_s": read,
            "import_torch_s": start,
            "extract_wall_s": wall,
            "extract_walls_s": walls,
            "wall_minus_import_over_read": (wall - start) / read,
            "in_process_s": inside,
            "in_process_over_read": statistics.median(inside) / read,
            "error_over_optimum_worst": max(ratios),
            "error_over_optimum_median": statistics.median(ratios),
            "child_maxrss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        }
    for name, value in figures.items():
        print(f"{name:30} {round(value, 5) if isinstance(value, float) else value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
