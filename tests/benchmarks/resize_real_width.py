"""Time, memory and accuracy of `lycotool resize` on adapters of real width, by hand.

    python tests/benchmarks/resize_real_width.py [--device cuda] [--rounds 3] [--quick]
                                                 [--threads N] [--folder DIR] [--json FILE]

On the CPU: a LoCon of rank 32 over the 354 linear and convolution layers of SD 1.5 (282 of
the UNet, 72 of the text encoder), resized to rank 8. With ``--device cuda``: rank 128 over the
794 of SDXL's UNet, resized to rank 32; ``--model`` chooses otherwise. Weights are random, in
fp16, in a temporary folder that is removed at the end (2 GB of disk at most). ``--quick`` takes
every eighth layer. On a machine that others use, ``--threads 1`` keeps torch's threads from
waiting for each other.

Whole processes are timed first, all in the same rounds: `lycotool resize`, importing torch,
and the plain way, which loads the file, takes a QR of both factors and an SVD of the small
core of one module after another, and saves. Then the computation alone, tensors in the
device's memory already and nothing written: lycotool's, the plain loop's, and a dense
`torch.linalg.svd` of some layers, from which the time of all layers is extrapolated by their
``rows · columns · min(rows, columns)``. Last, the written file is compared with the optimal
truncation of a sample of modules, in float64 from QR decompositions.

Memory is the largest RssAnon seen in /proc/PID/status every 20 ms, and the kernel's own
high-water mark ``maxrss``, which counts mapped files too.

"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shapes import layers

# Only the standard library here: a child's maxrss starts from its parent's size.

if TYPE_CHECKING:
    import torch

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[2]  # children start here, so that `python -m lycotool` is this one
SAMPLE_SECONDS = 0.02
MIB = 2**20

#: Old and new rank by model.
RANKS = {"sd15": (32, 8), "sdxl": (128, 32)}
DENSE_LAYERS = 5
CHECKED_MODULES = 40


# --- children ------------------------------------------------------------------------------


def make(path: Path, model: str, quick: bool) -> None:
    """Write the adapter."""
    import numpy as np

    from lycotool.io.writer import FilePlan, TensorPlan, write_file

    rank, _ = RANKS[model]
    plans: dict[str, TensorPlan] = {}
    for path_of, (out, width, *kernel) in layers(model, quick=quick).items():
        name = path_of.replace(".", "_")
        ones = (1,) * len(kernel)
        plans[f"{name}.lora_up.weight"] = TensorPlan("F16", (out, rank, *ones))
        plans[f"{name}.lora_down.weight"] = TensorPlan("F16", (rank, width, *kernel))
        plans[f"{name}.alpha"] = TensorPlan("F16", ())
    # One pool of random numbers serves all tensors, each from its own place on.
    pool = np.random.default_rng(1).standard_normal(2**22, dtype=np.float32)
    values = memoryview((pool * 0.05).astype(np.float16)).cast("B")

    def produce(key: str) -> Iterator[memoryview]:
        if key.endswith(".alpha"):
            yield memoryview(np.float16(rank / 2).tobytes())
            return
        left, start = plans[key].nbytes, 2 * (zlib.crc32(key.encode()) % (2**21))
        while left:
            piece = values[start : start + left]
            yield piece
            left, start = left - len(piece), 0

    write_file(path, FilePlan(plans, {"format": "pt"}), produce)


def truncated(up: torch.Tensor, down: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way: QR of both factors, SVD of the core."""
    import torch

    left, core_left = torch.linalg.qr(up.flatten(1))
    right, core_right = torch.linalg.qr(down.flatten(1).T)
    u, s, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return left @ (u[:, :rank] * s[:rank]), v[:rank] @ right.T


def plain(source: Path, target: Path, rank: int, device: str) -> None:
    """Load, truncate one module after another, save, flush."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    for key in [key for key in tensors if key.endswith(".lora_up.weight")]:
        name = key.removesuffix(".lora_up.weight")
        up, down = tensors[key], tensors[f"{name}.lora_down.weight"]
        alpha = tensors[f"{name}.alpha"]
        new_up, new_down = truncated(up.to(device).float(), down.to(device).float(), rank)
        kept = len(new_down)  # less than the rank where the layer is narrower
        tensors[key] = new_up.reshape(up.shape[0], kept, *up.shape[2:]).to(up.dtype).cpu().contiguous()
        tensors[f"{name}.lora_down.weight"] = (
            new_down.reshape(kept, *down.shape[1:]).to(down.dtype).cpu().contiguous()
        )
        tensors[f"{name}.alpha"] = (alpha.float() / len(down) * kept).to(alpha.dtype)
    save_file(tensors, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def ours(source: Path, target: Path, rank: int, device: str) -> None:
    """`lycotool resize` where typer and rich are missing: the operation without the command line."""
    from lycotool.ops.resize import ResizeOptions, resize

    resize(str(source), ResizeOptions(output=str(target), rank=rank, device=device))


def clock(work: Callable[[], object], device: str) -> float:
    """Seconds until the device has finished too."""
    import torch

    def settle() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def compute(source: Path, rank: int, device: str, rounds: int) -> dict[str, object]:
    """Seconds of the computation alone: lycotool, the plain loop, and dense SVDs."""
    import torch
    from safetensors.torch import load_file

    from lycotool.io.store import TensorStore
    from lycotool.ops.resize import ResizeOptions, resize

    loaded = {key: tensor.to(device) for key, tensor in load_file(source).items()}
    TensorStore.tensor = lambda self, key, *, pinned=False: loaded[key]  # type: ignore[assignment, method-assign]
    options = ResizeOptions(
        output=str(source.with_name("none.safetensors")), rank=rank, device=device, dry_run=True
    )
    first = clock(lambda: resize(str(source), options), device)
    measured = [clock(lambda: resize(str(source), options), device) for _ in range(rounds)]

    names = [key.removesuffix(".lora_up.weight") for key in loaded if key.endswith(".lora_up.weight")]

    def loop() -> None:
        for name in names:
            up, down = loaded[f"{name}.lora_up.weight"], loaded[f"{name}.lora_down.weight"]
            for factor in truncated(up.float(), down.float(), rank):
                factor.to(up.dtype).cpu()

    loop_first = clock(loop, device)
    loop_times = [clock(loop, device) for _ in range(rounds)]

    def work_of(name: str) -> float:
        rows = loaded[f"{name}.lora_up.weight"].shape[0]
        columns = loaded[f"{name}.lora_down.weight"][0].numel()
        return float(rows * columns * min(rows, columns))

    # Layers spread evenly over the total work, so that the large ones are not forgotten.
    ordered = sorted(names, key=work_of)
    total = sum(map(work_of, ordered))
    chosen, passed = [], 0.0
    for name in ordered:
        passed += work_of(name)
        if passed >= total * (len(chosen) + 0.5) / DENSE_LAYERS and len(chosen) < DENSE_LAYERS:
            chosen.append(name)
    dense = []
    for name in chosen:
        up, down = loaded[f"{name}.lora_up.weight"].float(), loaded[f"{name}.lora_down.weight"].float()
        matrix = up.flatten(1) @ down.flatten(1)
        if not dense:
            clock(lambda: torch.linalg.svd(matrix[:64], full_matrices=False), device)  # noqa: B023 - warm-up
        dense.append(clock(lambda: torch.linalg.svd(matrix, full_matrices=False), device))  # noqa: B023
    rate = sum(dense) / sum(map(work_of, chosen))
    return {
        "modules": len(names),
        "lycotool_first": first,
        "lycotool": measured,
        "plain_first": loop_first,
        "plain": loop_times,
        "dense_layers": len(chosen),
        "dense_measured": sum(dense),
        "dense_extrapolated": rate * total,
        "gpu_peak": torch.cuda.max_memory_allocated() if device != "cpu" else 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
    }


def check(source: Path, target: Path) -> dict[str, object]:
    """Error of the written file over the least possible, for a sample of modules."""
    import torch
    from safetensors import safe_open

    worst, count = 0.0, 0
    with safe_open(source, "pt") as before, safe_open(target, "pt") as after:
        names = sorted(k.removesuffix(".alpha") for k in before.keys() if k.endswith(".alpha"))  # noqa: SIM118
        for name in names[:: max(1, len(names) // CHECKED_MODULES)]:
            factors = []
            for file in (before, after):
                up, down = (
                    file.get_tensor(f"{name}.lora_{side}.weight").double().flatten(1)
                    for side in ("up", "down")
                )
                scale = float(file.get_tensor(f"{name}.alpha")) / down.shape[0]
                factors.append((scale * up, down))
            (up, down), (new_up, new_down) = factors
            rank = new_down.shape[0]
            # ‖A B‖ = ‖R_A R_Bᵀ‖: no dense matrix, and no Gram matrix as in what is checked.
            core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T
            best = float(torch.linalg.svdvals(core)[rank:].norm())
            if best == 0:
                continue  # all of it is kept
            left = torch.linalg.qr(torch.cat([up, -new_up], dim=1)).R
            right = torch.linalg.qr(torch.cat([down, new_down]).T).R
            worst = max(worst, float((left @ right.T).norm()) / best - 1)
            count += 1
    return {"modules": count, "worst_excess": worst}


# --- measuring -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One child process: seconds on the clock and of all CPUs, and bytes of memory."""

    seconds: float
    cpu: float
    anonymous: int
    maxrss: int


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines.get("RssAnon", "0 kB").split()[0]) * 1024


def run(command: Iterable[str]) -> Run:
    """Run a command to its end and watch its memory."""
    peak = 0
    done = threading.Event()
    start = time.perf_counter()
    process = subprocess.Popen([*command], stdout=subprocess.DEVNULL, cwd=ROOT)

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
    if process.returncode:
        raise SystemExit(f"{[*command]} failed with {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, usage.ru_maxrss * 1024)


def child(action: str, *arguments: object) -> list[str]:
    """Run one part of this script in a process of its own."""
    return [sys.executable, str(SCRIPT), "--child", action, *map(str, arguments)]


def answer(command: list[str]) -> dict[str, object]:
    """The JSON object a child prints."""
    result: dict[str, object] = json.loads(
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout
    )
    return result


def whole_processes(source: Path, rank: int, device: str, rounds: int) -> dict[str, list[Run]]:
    """Every command once per round, so that a busy minute of the machine hits all of them."""
    target = source.with_name("out.safetensors")
    command = [sys.executable, "-m", "lycotool", "resize", str(source), "--rank", str(rank), "-o", str(target),
               "-q", "--device", device]  # fmt: skip
    if importlib.util.find_spec("typer") is None:
        print("typer is missing: the operation is timed without the command line")
        command = child("ours", source, target, rank, device)
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for name, words in {
            "import torch": [sys.executable, "-c", "import torch"],
            "plain QR loop": child("plain", source, target, rank, device),
            "lycotool": command,
        }.items():
            target.unlink(missing_ok=True)
            runs.setdefault(name, []).append(run(words))
    return runs  # the last command was lycotool: its file is there to be checked


def table(runs: Mapping[str, list[Run]]) -> str:
    """Medians, and ratios to importing torch."""

    def median(name: str, attribute: str) -> float:
        return statistics.median(getattr(one, attribute) for one in runs[name])

    titles = ("wall s", "min-max", "x torch", "CPU s", "anon MiB", "- torch", "maxrss MiB")
    lines = [f"{'':16}" + "".join(f"{title:>12}" for title in titles)]
    for name, measured in runs.items():
        times = [one.seconds for one in measured]
        cells = (
            f"{median(name, 'seconds'):.2f}",
            f"{min(times):.1f}-{max(times):.1f}",
            f"{median(name, 'seconds') / median('import torch', 'seconds'):.2f}",
            f"{median(name, 'cpu'):.2f}",
            f"{median(name, 'anonymous') / MIB:.0f}",
            f"{(median(name, 'anonymous') - median('import torch', 'anonymous')) / MIB:.0f}",
            f"{median(name, 'maxrss') / MIB:.0f}",
        )
        lines.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def describe(computed: Mapping[str, object], checked: Mapping[str, object]) -> str:
    """The computation alone, and the error."""
    mine = statistics.median(computed["lycotool"])  # type: ignore[call-overload]
    loop = statistics.median(computed["plain"])  # type: ignore[call-overload]
    dense = float(str(computed["dense_extrapolated"]))
    dense_source = f"{computed['dense_layers']} of {computed['modules']} layers"
    lines = [
        f"computation alone on {computed['device']}, {computed['threads']} threads, medians:",
        f"  lycotool       {mine:9.3f} s   (first call {computed['lycotool_first']:.3f} s)",
        f"  plain QR loop  {loop:9.3f} s   (first call {computed['plain_first']:.3f} s)   {loop / mine:.1f} x",
        f"  dense SVD      {dense:9.1f} s   extrapolated from {dense_source}   {dense / mine:.0f} x",
        f"error of {checked['modules']} modules: at most {checked['worst_excess']:.1e} above the optimum",
    ]
    if computed["gpu_peak"]:
        lines.append(f"largest GPU memory {int(str(computed['gpu_peak'])) / MIB:.0f} MiB, inputs included")
    return "\n".join(lines)


def act(action: str, arguments: list[str]) -> None:
    """Be a child."""
    if action == "make":
        make(Path(arguments[0]), arguments[1], arguments[2] == "True")
    elif action in ("plain", "ours"):
        work = plain if action == "plain" else ours
        work(Path(arguments[0]), Path(arguments[1]), int(arguments[2]), arguments[3])
    elif action == "compute":
        found = compute(Path(arguments[0]), int(arguments[1]), arguments[2], int(arguments[3]))
        print(json.dumps(found))
    elif action == "check":
        print(json.dumps(check(Path(arguments[0]), Path(arguments[1]))))


def main() -> None:
    """Make the file, measure, print, remove the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", choices=RANKS, help="sd15 on the CPU, else sdxl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of every process; torch takes all cores by itself")
    parser.add_argument("--quick", action="store_true", help="every eighth layer")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.child:
        act(options.child[0], options.child[1:])
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # children inherit it
    model = options.model or ("sd15" if options.device == "cpu" else "sdxl")
    old, new = RANKS[model]
    folder = Path(tempfile.mkdtemp(prefix="lycotool-benchmark-", dir=options.folder)).resolve()
    source = folder / "adapter.safetensors"
    try:
        subprocess.run(child("make", source, model, options.quick), check=True, cwd=ROOT)
        size = source.stat().st_size
        load = os.getloadavg()[0]
        runs = whole_processes(source, new, options.device, options.rounds)
        checked = answer(child("check", source, source.with_name("out.safetensors")))
        computed = answer(child("compute", source, new, options.device, options.rounds))
    finally:
        shutil.rmtree(folder)
    print(f"{model}: {computed['modules']} modules, rank {old} to {new}, {size / MIB:.0f} MiB; {os.cpu_count()} CPUs, "
          f"load {load:.1f} before, {options.rounds} rounds, medians")  # fmt: skip
    print(table(runs))
    print(describe(computed, checked))
    if options.json:
        document = {
            "model": model, "ranks": [old, new], "quick": options.quick, "bytes": size, "cpus": os.cpu_count(),
            "load_before": load, "computation": computed, "check": checked,
            "runs": {name: [asdict(one) for one in measured] for name, measured in runs.items()},
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
