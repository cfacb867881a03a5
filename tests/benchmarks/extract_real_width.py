"""Time, memory and error of `lycotool extract` on a UNet of real width, by hand.

    python tests/benchmarks/extract_real_width.py SHAPES.json [--device cuda] [--rank 64]
        [--folder DIR] [--json FILE] [--layers N]

SHAPES.json maps diffusers layer paths to weight shapes (`resize_real_width.py
--write-shapes` makes it). Two fp16 checkpoints with these layers are made: random weights,
and the same plus a difference that fine-tuning might leave, a few strong directions and a
flat tail. Yardstick in the same run: reading both files' bytes. The error of a sample of
layers is compared with the optimum, from a float64 SVD of what the files really differ by.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def make(shapes: dict[str, list[int]], folder: Path, device: str) -> tuple[Path, Path]:
    """Write both checkpoints, one layer at a time."""
    sys.path.insert(0, str(ROOT))
    from lycotool.io.writer import FilePlan, TensorPlan, write_file

    plans = {
        f"model.diffusion_model.{name}.weight": TensorPlan("F16", tuple(s)) for name, s in shapes.items()
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
        best = values[rank:].square().sum().sqrt()
        found.append(float((two - one - up @ down).norm() / best))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = dict(list(json.loads(options.shapes.read_text()).items())[: options.layers])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = make(shapes, Path(folder), options.device)
        output = Path(folder) / "out.safetensors"
        command = [sys.executable, "-m", "lycotool", "extract", *map(str, paths), "--rank", str(options.rank),
                   "--device", options.device, "--dtype", "fp32", "-f", "-q", "-o", str(output)]  # fmt: skip
        reads, walls, imports = [], [], []
        for _ in range(options.rounds):
            reads.append(read_all(paths))
            imports.append(timed([sys.executable, "-c", "import torch; torch.zeros(1)"])[0])
            walls.append(timed(command)[0])
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
            "error_over_optimum_worst": max(ratios),
            "error_over_optimum_median": statistics.median(ratios),
            "child_maxrss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        }
    for name, value in figures.items():
        print(f"{name:30} {value if not isinstance(value, float) else round(value, 5)}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
