"""Peak memory of `lycotool bake` on sharded checkpoints of Flux's shapes, by hand.

    python tests/benchmarks/bake_sharded.py [--gb 20] [--kinds bf16 fp8 verify] [--folder DIR] [--json FILE]

Makes checkpoints of a quarter, a half and all of ``--gb`` (decimal GB), with the shapes of
Flux.1 and as many blocks as that takes, in shards of 5 GB, and a LoRA of rank 16 for every
linear layer; folds it in with a sharded output. The inputs are sparse files, so they read as
zeros and take no disk; the output takes ``--gb``. ``fp8`` has scaled float8 weights,
``verify`` bfloat16 ones and ``--verify``.

What is shown is the largest RssAnon seen every 20 ms (memory of the process alone) less that of
a process that only imports torch, against the bound that ``bake --dry-run`` states for the
largest layer, and the kernel's ``maxrss``, which counts mapped files too. It fails where a run
takes more than the bound and 300 MiB for buffers, headers and Python, or where the largest
checkpoint takes 64 MiB more than the smallest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

# Only the standard library here: a child's maxrss starts from its parent's size.
from bake_real_width import MIB, ROOT, Run, run

WIDTH, HEAD, RANK = 3072, 128, 16
SHARD_BYTES = 5 * 10**9
KINDS = {"bf16": (), "fp8": (), "verify": ("--verify",)}

#: Beside the layer: torch's own buffers, the pieces of copied tensors, headers, Python objects.
ALLOWANCE = 300 * MIB
GROWTH = 64 * MIB

Shape = tuple[int, ...]


def linears(groups: int) -> Iterator[tuple[str, Shape]]:
    """The linear layers of a Flux with so many double blocks and twice as many single ones."""
    wide = 4 * WIDTH
    for block in range(groups):
        for stream in ("img", "txt"):
            path = f"double_blocks.{block}.{stream}"
            yield f"{path}_attn.qkv", (3 * WIDTH, WIDTH)
            yield f"{path}_attn.proj", (WIDTH, WIDTH)
            yield f"{path}_mlp.0", (wide, WIDTH)
            yield f"{path}_mlp.2", (WIDTH, wide)
            yield f"{path}_mod.lin", (6 * WIDTH, WIDTH)
    for block in range(2 * groups):
        path = f"single_blocks.{block}"
        yield f"{path}.linear1", (3 * WIDTH + wide, WIDTH)
        yield f"{path}.linear2", (WIDTH, WIDTH + wide)
        yield f"{path}.modulation.lin", (3 * WIDTH, WIDTH)
    yield "img_in", (WIDTH, 64)
    yield "txt_in", (WIDTH, 4096)
    yield "final_layer.linear", (64, WIDTH)


def checkpoint(groups: int, kind: str) -> dict[str, tuple[str, Shape]]:
    """Dtype and shape of every tensor."""
    tensors: dict[str, tuple[str, Shape]] = {}
    for path, shape in linears(groups):
        tensors[f"{path}.weight"] = ("F8_E4M3" if kind == "fp8" else "BF16", shape)
        if kind == "fp8":
            tensors[f"{path}.scale_weight"] = ("F32", ())
        tensors[f"{path}.bias"] = ("BF16", shape[:1])
    return tensors


def nbytes(tensor: tuple[str, Shape]) -> int:
    """Bytes of one tensor."""
    return {"F32": 4, "BF16": 2, "F8_E4M3": 1}[tensor[0]] * math.prod(tensor[1])


def write_sparse(path: Path, tensors: Mapping[str, tuple[str, Shape]]) -> None:
    """A safetensors file whose data is a hole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        stop = position + nbytes(tensor)
        header[name] = {"dtype": tensor[0], "shape": list(tensor[1]), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


def write_sharded(folder: Path, tensors: Mapping[str, tuple[str, Shape]]) -> Path:
    """The checkpoint in shards; its index."""
    shards: list[dict[str, tuple[str, Shape]]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + nbytes(tensor) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += nbytes(tensor)
    weights = {}
    for number, shard in enumerate(shards):
        write_sparse(folder / f"in-{number}.safetensors", shard)
        weights |= dict.fromkeys(shard, f"in-{number}.safetensors")
    index = folder / "in.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    return index


def make_adapter(groups: int, path: Path) -> None:
    """A LoRA of random numbers for every linear layer (child process)."""
    import torch
    from safetensors.torch import save_file

    pool = torch.randn(2 * RANK * 8 * WIDTH).bfloat16()
    tensors = {}
    for layer, (rows, columns) in linears(groups):
        name = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{name}.lora_up.weight"] = pool[: rows * RANK].view(rows, RANK).clone()
        tensors[f"{name}.lora_down.weight"] = pool[-columns * RANK :].view(RANK, columns).clone()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def measure(gigabytes: float, kind: str, folder: Path) -> tuple[float, int, Run]:
    """Bake a checkpoint of this size: its real size in GB, the stated bound, and what it took."""
    one = sum(map(nbytes, checkpoint(1, kind).values()))
    groups = max(1, round(gigabytes * 1e9 / one))
    tensors = checkpoint(groups, kind)
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        index, adapter = write_sharded(work, tensors), work / "lora.safetensors"
        subprocess.run([sys.executable, __file__, "--make", str(groups), str(adapter)], check=True, cwd=ROOT)
        command = [sys.executable, "-m", "lycotool", "bake", str(index), str(adapter), *KINDS[kind],
                   "--device", "cpu", "-q", "-o", str(work / "out.safetensors.index.json")]  # fmt: skip
        planned = subprocess.run([*command, "-n", "--json"], check=True, cwd=ROOT, capture_output=True)
        bound = json.loads(planned.stdout)["peak_bytes"]
        return sum(map(nbytes, tensors.values())) / 1e9, bound, run(command)
    finally:
        shutil.rmtree(work)


def main() -> None:
    """Measure three sizes of each kind, print the table, and fail where the bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=20.0, help="size of the largest checkpoint")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_adapter(int(options.make[0]), Path(options.make[1]))
        return
    idle = run([sys.executable, "-c", "import torch"])
    titles = ("GB", "wall s", "CPU s", "anon - torch", "bound MiB", "of bound", "maxrss MiB")
    print(
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; importing torch {idle.anonymous / MIB:.0f} MiB"
    )
    print(f"{'':8}" + "".join(f"{title:>14}" for title in titles))
    rows, faults = [], []
    for kind in options.kinds:
        taken = []
        for share in (0.25, 0.5, 1.0):
            size, bound, found = measure(share * options.gb, kind, options.folder)
            own = found.anonymous - idle.anonymous
            taken.append(own)
            cells = (f"{size:.1f}", f"{found.seconds:.0f}", f"{found.cpu:.0f}", f"{own / MIB:.0f}",
                     f"{bound / MIB:.0f}", f"{own / bound:.2f}", f"{found.maxrss / MIB:.0f}")  # fmt: skip
            print(f"{kind:8}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
            rows.append({"kind": kind, "gb": size, "bound": bound, "own": own, **asdict(found)})
            if own > bound + ALLOWANCE:
                faults.append(
                    f"{kind}, {size:.1f} GB: {own / MIB:.0f} MiB, the bound is {bound / MIB:.0f} MiB"
                )
        if taken[-1] > taken[0] + GROWTH:
            faults.append(f"{kind}: memory grows with the checkpoint")
    if options.json:
        options.json.write_text(json.dumps({"idle": asdict(idle), "runs": rows}, indent=2) + "\n")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
