"""The computation without start-up and files, and its error; a child that prints JSON.

``python -m benchmarks.alone resize ADAPTER RANK DEVICE ROUNDS`` has the tensors in the device's
memory already and writes nothing; ``extract BASE TUNED RANK DEVICE ROUNDS OUTPUT`` goes from files to
file in a process that has imported torch and used the device. Both time a dense
``torch.linalg.svd`` of some layers beside it and extrapolate that to all layers by their
``rows · columns · min(rows, columns)``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import truncated

if TYPE_CHECKING:
    import torch

DENSE_LAYERS = 3
CHECKED_MODULES = 24


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


def dense_seconds(
    matrices: Mapping[str, Callable[[], torch.Tensor]], works: Mapping[str, float], device: str
) -> float:
    """Seconds that a dense SVD of every layer would take, from layers spread evenly over the work."""
    import torch

    ordered = sorted(works, key=works.__getitem__)
    total, passed = sum(works.values()), 0.0
    chosen: list[str] = []
    for name in ordered:
        passed += works[name]
        if passed >= total * (len(chosen) + 0.5) / (2 * DENSE_LAYERS) and len(chosen) < DENSE_LAYERS:
            chosen.append(name)  # of the smaller half: the largest take minutes on a CPU
    clock(lambda: torch.linalg.svd(torch.eye(64, device=device), full_matrices=False), device)
    taken = 0.0
    for name in chosen:
        matrix = matrices[name]()
        taken += clock(lambda: torch.linalg.svd(matrix, full_matrices=False), device)  # noqa: B023
    return taken / sum(works[name] for name in chosen) * total


def resize_alone(source: Path, rank: int, device: str, rounds: int) -> dict[str, object]:
    """Lycotool's computation, a loop of QRs, and dense SVDs."""
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

    clock(loop, device)
    loops = [clock(loop, device) for _ in range(rounds)]

    def work_of(name: str) -> float:
        rows = loaded[f"{name}.lora_up.weight"].shape[0]
        columns = loaded[f"{name}.lora_down.weight"][0].numel()
        return float(rows * columns * min(rows, columns))

    def matrix_of(name: str) -> torch.Tensor:
        up, down = (loaded[f"{name}.lora_{side}.weight"].float().flatten(1) for side in ("up", "down"))
        return up @ down

    dense = dense_seconds(
        {name: lambda name=name: matrix_of(name) for name in names},
        {name: work_of(name) for name in names},
        device,
    )
    return {
        "first": first,
        "lycotool": statistics.median(measured),
        "QR of each module": statistics.median(loops),
        "dense SVD, extrapolated": dense,
        "gpu": torch.cuda.max_memory_reserved() if device != "cpu" else None,
    }


def extract_warm(
    base: Path, tuned: Path, rank: int, device: str, rounds: int, output: Path
) -> dict[str, object]:
    """Files to file in a warm process, reading both files, and dense SVDs; errors over the optimum."""
    import torch
    from safetensors import safe_open

    from lycotool.ops.extract import ExtractOptions, extract

    options = ExtractOptions(output=str(output), rank=rank, device=device, force=True)
    walls, reads = [], []
    for _ in range(rounds + 1):
        output.unlink(missing_ok=True)
        walls.append(clock(lambda: extract(str(base), str(tuned), options), device))
        reads.append(clock(lambda: _read(base, tuned), "cpu"))
    gpu = torch.cuda.max_memory_reserved() if device != "cpu" else None
    extract(str(base), str(tuned), replace(options, dtype="fp32"))  # its error, without rounding to fp16
    files = [safe_open(path, "pt", device=device) for path in (base, tuned, output)]
    works = {}
    for key in list(files[0].keys()):
        rows, *rest = files[0].get_slice(key).get_shape()
        columns = 1
        for size in rest:
            columns *= size
        works[key] = float(rows * columns * min(rows, columns))

    def difference(key: str) -> torch.Tensor:
        one, two = (file.get_tensor(key).float().flatten(1) for file in files[:2])
        return two - one

    dense = dense_seconds({key: lambda key=key: difference(key) for key in works}, works, device)
    ratios = _over_optimum(files, rank)
    return {
        "first": walls[0],
        "lycotool": statistics.median(walls[1:]),
        "reading both files": statistics.median(reads[1:]),
        "dense SVD, extrapolated": dense,
        "gpu": gpu,
        "error over the optimum": {"worst": max(ratios), "median": statistics.median(ratios)}
        if ratios
        else None,
    }


def _over_optimum(files: Sequence[object], rank: int) -> list[float]:
    """Error of a sample of layers over the least error of that rank, in float64."""
    import torch

    base, tuned, adapter = files
    prefix = "model.diffusion_model."
    keys = {
        "lora_unet_" + key.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): key
        for key in list(base.keys())  # type: ignore[attr-defined]
    }
    stored = list(adapter.keys())  # type: ignore[attr-defined]
    modules = sorted(k.removesuffix(".lora_up.weight") for k in stored if k.endswith(".lora_up.weight"))
    small = [name for name in modules if adapter.get_tensor(f"{name}.lora_up.weight").shape[0] <= 640]  # type: ignore[attr-defined]
    found = []
    for name in small[:: max(1, len(small) // CHECKED_MODULES)]:
        one, two = (file.get_tensor(keys[name]).double().flatten(1) for file in (base, tuned))  # type: ignore[attr-defined]
        up, down = (
            adapter.get_tensor(f"{name}.lora_{side}.weight").double().flatten(1)  # type: ignore[attr-defined]
            for side in ("up", "down")
        )
        best = torch.linalg.svdvals(two - one)[rank:].square().sum().sqrt()
        if best > 0:  # nothing is left of a layer that small
            found.append(float((two - one - up @ down).norm() / best))
    return found


def _read(*paths: Path) -> None:
    buffer = bytearray(2**24)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def resize_error(source: Path, target: Path) -> dict[str, object]:
    """Error of a written file over the least possible, for a sample of modules."""
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
            # ‖A B‖ = ‖R_A R_Bᵀ‖: no dense matrix, and no Gram matrix as in what is checked.
            core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T
            best = float(torch.linalg.svdvals(core)[new_down.shape[0] :].norm())
            if best == 0:
                continue  # all of it is kept
            left = torch.linalg.qr(torch.cat([up, -new_up], dim=1)).R
            right = torch.linalg.qr(torch.cat([down, new_down]).T).R
            worst = max(worst, float((left @ right.T).norm()) / best - 1)
            count += 1
    return {"modules": count, "worst excess": worst}


def main() -> None:
    """Be a child."""
    name, *words = sys.argv[1:]
    if name == "resize":
        found = resize_alone(Path(words[0]), int(words[1]), words[2], int(words[3]))
    elif name == "extract":
        found = extract_warm(
            Path(words[0]), Path(words[1]), int(words[2]), words[3], int(words[4]), Path(words[5])
        )
    else:
        found = resize_error(Path(words[0]), Path(words[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
