"""Time and memory of `lycotool train` at real size, by hand, on a GPU.

    python tests/benchmarks/train_real_size.py [--family sd1 sdxl] [--algo lora loha lokr full]
        [--steps 50] [--batch 1] [--side N] [--device cuda] [--precision bf16] [--micro] [--json FILE]

Builds SD 1.5 (512x512) and SDXL (1024x1024) from their published configs, directly on the device, with random
weights and no file, and trains through the loop that users run: caches, draws, forward, backward, clipping, fused
AdamW. The UNet alone is trained, every linear and convolution layer of it (`--preset full`); dim 16, alpha 8, LoKr
with factor 8. Losses are fetched every five steps, so that the time between two fetches is that of five steps; the
first ten, in which a step is recorded as a graph, are left out. Random weights: the numbers are time and memory, the
loss means nothing. ``train_step.py`` compares them with the frozen UNet and with peers.

``--micro`` shrinks the models to run everywhere in seconds, to see that the script works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this copy, wherever the script is started
# ruff: noqa: E402

from lycotool.training import config
from lycotool.training.assemble import make_run
from lycotool.training.bases import build, configs
from lycotool.training.bases.detect import Predicts
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.schedule import alphas_cumprod
from lycotool.training.loop import train
from lycotool.training.observe import Observer, StepRecord
from lycotool.training.plan import StepPlan
from lycotool.training.setup import prepare

SIDES = {"sd1": 512, "sd2": 512, "sdxl": 1024}
WARM_UP = 10
WINDOW = 5
LEARNING_RATES = {"full": 2e-6, "ia3": 1e-3}
NETWORK: dict[str, dict[str, Any]] = {
    "lora": {"dim": 16, "alpha": 8.0},
    "loha": {"dim": 8, "alpha": 4.0},
    "lokr": {"dim": 16, "alpha": 8.0, "factor": 8},
    "dora": {"algo": "lora", "dim": 16, "alpha": 8.0, "dora_wd": True},
    "glora": {"dim": 16, "alpha": 8.0},
    "dylora": {"dim": 16, "alpha": 8.0},
    "ia3": {},
    "diag-oft": {"dim": 16},
    "boft": {"dim": 16},
    "full": {},
    "norm": {"algo": "lora", "train_norm": True, "preset": "norms.toml"},
}

#: Every norm of the UNet and nothing else: what ``norm`` costs by itself.
NORMS = (
    'enable_conv = false\nunet_target_module = ["GroupNorm", "LayerNorm"]\ntext_encoder_target_module = []\n'
)


class Clock(Observer):
    """Notes when each fetch was complete."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}
        self.records: list[StepRecord] = []
        self.warnings: list[str] = []

    def step(self, record: StepRecord) -> None:
        self.times[record.step] = time.perf_counter()
        self.records.append(record)

    def warning(self, text: str) -> None:
        self.warnings.append(text)
        print(text, file=sys.stderr)

    def seconds(self) -> list[float]:
        """Of a step, by windows of :data:`WINDOW` after the warm-up."""
        ends = [step for step in self.times if step % WINDOW == 0 and step >= WARM_UP]
        return [(self.times[b] - self.times[a]) / WINDOW for a, b in itertools.pairwise(ends)]


class Nothing:
    """No validation, no images, no files."""

    def before(self) -> None: ...

    def after(self, planned: StepPlan) -> None: ...

    def is_due(self, planned: StepPlan) -> bool:
        return False

    def interrupted(self, done: int) -> None: ...


def random_base(family: str, device: torch.device, dtype: torch.dtype, *, micro: bool) -> BaseModel:
    """A base of the published structure, initialised as its layers do by themselves."""
    own = configs.published(family)
    if micro:
        _shrink(own)
    unet = build.empty_unet(own["unet"], path=family)
    vae = build.empty_vae(own["vae"], path=family)
    texts = [
        build.empty_text_encoder(entry, has_projection=number > 0, path=family)
        for number, entry in enumerate(own["text_encoders"])
    ]
    for model, kind in ((unet, dtype), (vae, torch.float32), *((text, dtype) for text in texts)):
        _fill(model, device, kind)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return BaseModel(
        path=family, family=family, predicts=Predicts("epsilon", ""), unet=unet, vae=vae, text_encoders=texts,
        unet_table=configs.unet_table(family, own["unet"]), latent_scale=own["vae"].get("scaling_factor", 0.18215),
        base_alphas=alphas_cumprod(), unet_dtype=dtype, vae_dtype=torch.float32, te_dtype=dtype, device=device,
    )  # fmt: skip


def _fill(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    model.to(dtype).to_empty(device=device)
    filled: set[int] = set()
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            filled |= {id(parameter) for parameter in module.parameters(recurse=False)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in filled:
                parameter.normal_(0, 0.02)
        for name, buffer in model.named_buffers():
            assert name.endswith("position_ids"), name
            buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    model.eval().requires_grad_(False)


def _shrink(own: dict[str, Any]) -> None:
    """The same classes at the smallest widths."""
    unet = own["unet"]
    levels = len(unet["block_out_channels"])
    unet |= {"block_out_channels": [32] * levels, "layers_per_block": 1, "cross_attention_dim": 64}
    if isinstance(unet["attention_head_dim"], list):
        unet["attention_head_dim"] = [1] * levels
    if "transformer_layers_per_block" in unet:
        unet["transformer_layers_per_block"] = [1] * levels
    own["vae"] |= {"block_out_channels": [32] * len(own["vae"]["block_out_channels"]), "layers_per_block": 1}
    count = len(own["text_encoders"])
    for text in own["text_encoders"]:
        width = 64 // count
        text |= {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2,
                 "num_attention_heads": 1, "projection_dim": width}  # fmt: skip
    if count > 1:
        unet["projection_class_embeddings_input_dim"] = 32 + 6 * unet["addition_time_embed_dim"]


def pictures(folder: Path, side: int, count: int) -> Path:
    """Noise with captions: content is of no matter here."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}", encoding="utf-8")
    return folder


def measure(
    base: BaseModel, algo: str, images: Path, side: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step and peak memory of one algorithm."""
    values = {
        "base": base.path, "dataset": str(images), "resolution": (side, side), "batch_size": arguments.batch,
        "algo": algo, **NETWORK[algo], "train_te": False, "steps": arguments.steps, "log_every": WINDOW,
        "lr": LEARNING_RATES.get(algo, 2e-4), "precision": arguments.precision, "device": arguments.device,
        "min_bucket_reso": min(256, side), "bucket_reso_steps": 8 if side < 256 else 64,
    }  # fmt: skip
    if algo == "norm":
        values["preset"] = str(images.parent / values["preset"])
        Path(values["preset"]).write_text(NORMS, encoding="utf-8")
    cuda = base.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(base.device)
    ready = prepare(config.build(values), load_weights=lambda path: {}, base=base)
    run = make_run(ready, Observer())
    clock = Clock()
    try:
        train(run, Nothing(), clock)
    finally:
        ready.network.detach()
    seconds = clock.seconds()
    found = {
        "family": base.family, "side": side, "batch": arguments.batch, "algo": algo,
        "modules": sum(row.modules for row in ready.network.table()),
        "parameters": sum(row.parameters for row in ready.network.table()),
        "seconds": statistics.median(seconds), "slowest": max(seconds),
        "peak_gib": torch.cuda.max_memory_allocated(base.device) / 2**30 if cuda else None,
        "finite": all(record.loss == record.loss for record in clock.records),
    }  # fmt: skip
    del run, ready
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", default=["sd1", "sdxl"], choices=list(SIDES))
    parser.add_argument("--algo", nargs="+", default=["lora", "loha", "lokr", "full"], choices=list(NETWORK))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32", "fp16"])
    parser.add_argument("--micro", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[arguments.precision]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {arguments.precision}, {arguments.steps} steps")
    print(
        f"{'family':<6} {'side':>5} {'batch':>5} {'algo':<5} {'parameters':>13} {'s/step':>8} {'slowest':>8} {'GiB':>6}"
    )
    results = []
    for family in arguments.family:
        side = arguments.side or (128 if arguments.micro else SIDES[family])
        base = random_base(family, device, dtype, micro=arguments.micro)
        with tempfile.TemporaryDirectory() as folder:
            images = pictures(Path(folder) / "images", side, max(2, arguments.batch))
            for algo in arguments.algo:
                found = measure(base, algo, images, side, arguments)
                results.append(found)
                peak = "" if found["peak_gib"] is None else f"{found['peak_gib']:.2f}"
                print(
                    f"{family:<6} {side:>5} {arguments.batch:>5} {algo:<5} {found['parameters']:>13,} "
                    f"{found['seconds']:>8.4f} {found['slowest']:>8.4f} {peak:>6}",
                    flush=True,
                )
        del base
        gc.collect()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
