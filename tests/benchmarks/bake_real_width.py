"""Time and memory of `lycotool bake` on a checkpoint of real width, by hand.

    python tests/benchmarks/bake_real_width.py [--rounds 3] [--folder DIR] [--json FILE]

Makes an fp16 checkpoint with the weights of v1-5-pruned-emaonly in their real size (1131
tensors, 2.1 GB) and adapters of 354 modules, all random, in a temporary folder that is
removed at the end (7 GB of disk at most). Every step is a child process. The yardsticks run in the same
rounds: copying the file, importing torch, and the usual merge script, which loads the whole
checkpoint, adds to one weight after another in float32 and saves. Everything that writes
flushes to disk before its clock stops.

Memory is the largest RssAnon seen in /proc/PID/status every 20 ms: pages that belong to the
process alone, without the file cache that a memory map shows. ``maxrss`` is the kernel's
own high-water mark, with those. Where the machine has other work, the clock says little;
compare CPU seconds then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# Only the standard library here: a child's maxrss starts from its parent's size.

SCRIPT = Path(__file__).resolve()
TESTS = SCRIPT.parents[1]
ROOT = TESTS.parent  # children start here, so that `python -m lycotool` is this one
ADAPTERS = ("locon", "loha", "lokr")
SAMPLE_SECONDS = 0.02
MIB = 2**20

LOCON_RANK, LOHA_RANK, LOKR_RANK, LOKR_FACTOR = 32, 8, 8, 8


# --- making the files (child process) ------------------------------------------------------


def real_shapes() -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape of every tensor of the checkpoint, and its weight's key by adapter module."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, str(TESTS))
    from makers import architectures as arch
    from makers.ldm_names import clip_to_ldm, unet_to_ldm, vae_to_ldm, with_prefix

    with torch.device("meta"):  # shapes without memory
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        )  # fmt: skip
        vae = AutoencoderKL(
            sample_size=512, latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
            )
        )
    # transformers 5 dropped this level, which checkpoints and adapters have.
    text = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in clip.state_dict().items()}
    state = with_prefix(arch.UNET_PREFIX, unet_to_ldm(unet.state_dict()))
    state |= with_prefix(arch.VAE_PREFIX, vae_to_ldm(vae.state_dict()))
    state |= with_prefix(arch.SD1_CLIP_PREFIX, clip_to_ldm(text))
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}

    names = {name: name for name in unet.state_dict()}
    ldm = {name: arch.UNET_PREFIX + new for new, name in unet_to_ldm(names).items()}
    keys = {
        "lora_unet_" + path.replace(".", "_"): ldm[f"{path}.weight"]
        for path, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    for name in text:
        if name.endswith((".fc1.weight", ".fc2.weight", "_proj.weight")):
            path = name.removesuffix(".weight")
            keys["lora_te_" + path.replace(".", "_")] = arch.SD1_CLIP_PREFIX + name
    return shapes, keys


def adapter_shapes(kind: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of one module over a weight of this shape."""
    out, width, *kernel = shape
    taps = math.prod(kernel)
    if kind == "locon":
        ones = (1,) * len(kernel)
        return {
            "lora_up.weight": (out, LOCON_RANK, *ones),
            "lora_down.weight": (LOCON_RANK, width, *kernel),
        }
    if kind == "loha":
        sides = {"a": (out, LOHA_RANK), "b": (LOHA_RANK, width * taps)}
        return {f"hada_w{number}_{side}": size for number in "12" for side, size in sides.items()}
    rows, columns = math.gcd(LOKR_FACTOR, out), math.gcd(LOKR_FACTOR, width)
    return {
        "lokr_w1": (rows, columns),
        "lokr_w2_a": (out // rows, LOKR_RANK),
        "lokr_w2_b": (LOKR_RANK, width // columns * taps),
    }


def make(folder: Path) -> None:
    """Write the checkpoint, the adapters and the map of module names."""
    import numpy as np

    from lycotool.io.writer import FilePlan, TensorPlan, write_file

    # One pool of random numbers serves all tensors, each from its own place on.
    pool = np.random.default_rng(1).standard_normal(2**22, dtype=np.float32)

    def write(name: str, shapes: Mapping[str, tuple[int, ...]], std: float) -> None:
        values = memoryview((pool * std).astype(np.float16)).cast("B")

        def produce(key: str) -> Iterator[memoryview]:
            if key.endswith(".alpha"):
                yield memoryview(np.float16(3).tobytes())
                return
            left, start = plans[key].nbytes, 2 * (zlib.crc32(key.encode()) % (2**21))
            while left:
                piece = values[start : start + left]
                yield piece
                left, start = left - len(piece), 0

        plans = {key: TensorPlan("F16", shape) for key, shape in shapes.items()}
        write_file(folder / f"{name}.safetensors", FilePlan(plans, {"format": "pt"}), produce)

    shapes, keys = real_shapes()
    write("base", shapes, 0.03)
    for kind in ADAPTERS:
        tensors: dict[str, tuple[int, ...]] = {}
        for module, key in keys.items():
            tensors |= {f"{module}.{slot}": size for slot, size in adapter_shapes(kind, shapes[key]).items()}
            tensors[f"{module}.alpha"] = ()
        write(kind, tensors, 0.05)
    (folder / "keys.json").write_text(json.dumps(keys))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    print(f"{len(shapes)} tensors, {parameters / 1e6:.0f} million numbers, {len(keys)} modules per adapter")


# --- the usual merge script (child process) ------------------------------------------------


def usual_merge(folder: Path, kind: str, output: Path) -> None:
    """Load everything, ``W += c·ΔW`` in float32 one weight at a time, save, flush."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "base.safetensors")
    adapter = load_file(folder / f"{kind}.safetensors")
    with torch.no_grad():
        for module, key in json.loads((folder / "keys.json").read_text()).items():
            part = {
                name: adapter[f"{module}.{name}"].float() for name in [*adapter_shapes(kind, (1, 1)), "alpha"]
            }
            if kind == "locon":
                rank = len(part["lora_down.weight"])
                delta = part["lora_up.weight"].flatten(1) @ part["lora_down.weight"].flatten(1)
            elif kind == "loha":
                rank = len(part["hada_w1_b"])
                delta = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
            else:
                rank = len(part["lokr_w2_b"])
                delta = torch.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"])
            weight = state[key]
            changed = weight.float() + (part["alpha"] / rank) * delta.reshape(weight.shape)
            state[key] = changed.to(weight.dtype)
    save_file(state, output)
    with output.open("rb+") as file:
        os.fsync(file.fileno())


def compare(first: Path, second: Path) -> None:
    """Say how far two results are apart: a benchmark of a wrong result is worth nothing."""
    import torch
    from safetensors import safe_open

    changed = total = 0
    largest = 0.0
    with safe_open(first, "pt") as left, safe_open(second, "pt") as right:
        if set(left.keys()) != set(right.keys()):
            raise SystemExit("the results have different tensors")
        for key in left.keys():  # noqa: SIM118 - this is not a dictionary
            a, b = left.get_tensor(key), right.get_tensor(key)
            total += a.numel()
            if not torch.equal(a, b):
                changed += int((a != b).sum())
                largest = max(
                    largest, ((a.float() - b.float()).abs() / b.abs().float().clamp_min(2**-14)).max().item()
                )
    # Neighbouring float16 numbers are at most 2⁻¹⁰ of their size apart.
    if largest > 2**-10:
        raise SystemExit(f"the results differ by {largest}")
    print(f"results agree: {changed / total:.2e} of the numbers are the next float16 number")


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


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured, in the order of a round; all but the first write ``out.safetensors``."""
    python, output = sys.executable, str(folder / "out.safetensors")
    base = str(folder / "base.safetensors")
    found = {
        "import torch": [python, "-c", "import torch"],
        "cp": ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", base, output],
    }
    for kind in ADAPTERS:
        adapter = str(folder / f"{kind}.safetensors")
        found[f"usual {kind}"] = [python, str(SCRIPT), "--usual", str(folder), kind, output]
        found[f"lycotool {kind}"] = [python, "-m", "lycotool", "bake", base, adapter, "-o", output, "-q",
                                     "--device", "cpu"]  # fmt: skip
    return found


def check_results(folder: Path) -> None:
    """Compare lycotool's files with those of the usual script, before anything is timed."""
    output, kept = folder / "out.safetensors", folder / "kept.safetensors"
    all_commands = commands(folder)
    for kind in ADAPTERS:
        subprocess.run(all_commands[f"usual {kind}"], check=True, cwd=ROOT)
        output.rename(kept)
        subprocess.run(all_commands[f"lycotool {kind}"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        print(f"{kind}: ", end="", flush=True)
        subprocess.run([sys.executable, str(SCRIPT), "--compare", str(output), str(kept)], check=True)
        output.unlink()
        kept.unlink()


def measure(folder: Path, rounds: int) -> dict[str, list[Run]]:
    """Every command once per round, so that a busy minute of the machine hits all of them."""
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for name, command in commands(folder).items():
            runs.setdefault(name, []).append(run(command))
            (folder / "out.safetensors").unlink(missing_ok=True)
    return runs


def table(runs: Mapping[str, list[Run]]) -> str:
    """Medians, and ratios to the yardsticks."""

    def median(name: str, attribute: str) -> float:
        return statistics.median(getattr(one, attribute) for one in runs[name])

    titles = ("wall s", "min-max", "x cp", "x usual", "CPU s", "anon MiB", "- torch", "x usual", "maxrss MiB")
    lines = [f"{'':16}" + "".join(f"{title:>12}" for title in titles)]
    for name, measured in runs.items():
        seconds, anonymous = median(name, "seconds"), median(name, "anonymous")
        usual = name.replace("lycotool", "usual")
        times = [one.seconds for one in measured]
        is_ours = name.startswith("lycotool")
        cells = (
            f"{seconds:.2f}",
            f"{min(times):.1f}-{max(times):.1f}",
            f"{seconds / median('cp', 'seconds'):.2f}",
            f"{seconds / median(usual, 'seconds'):.2f}" if is_ours else "",
            f"{median(name, 'cpu'):.2f}",
            f"{anonymous / MIB:.0f}",
            f"{(anonymous - median('import torch', 'anonymous')) / MIB:.0f}",
            f"{anonymous / median(usual, 'anonymous'):.3f}" if is_ours else "",
            f"{median(name, 'maxrss') / MIB:.0f}",
        )
        lines.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Make the files, measure, print the table, remove the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    for hidden in (("--make", 1), ("--usual", 3), ("--compare", 2)):
        parser.add_argument(hidden[0], nargs=hidden[1], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]))
    elif options.usual:
        usual_merge(Path(options.usual[0]), options.usual[1], Path(options.usual[2]))
    elif options.compare:
        compare(Path(options.compare[0]), Path(options.compare[1]))
    else:
        folder = Path(tempfile.mkdtemp(prefix="lycotool-benchmark-", dir=options.folder)).resolve()
        try:
            subprocess.run([sys.executable, str(SCRIPT), "--make", str(folder)], check=True, cwd=ROOT)
            check_results(folder)
            load = os.getloadavg()[0]
            runs = measure(folder, options.rounds)
        finally:
            shutil.rmtree(folder)
        print(f"{os.cpu_count()} CPUs, load {load:.1f} before, {options.rounds} rounds, medians")
        print(table(runs))
        if options.json:
            document = {name: [asdict(one) for one in measured] for name, measured in runs.items()}
            options.json.write_text(json.dumps({"load_before": load, "runs": document}, indent=2) + "\n")


if __name__ == "__main__":
    main()
