"""A training step of `lycotool train` beside the frozen UNet and the peers, in one run, by hand, on a GPU.

    python tests/benchmarks/train_step.py [--family sdxl] [--batch 2] [--algo lora loha ...] [--peers]
        [--steps 40] [--json FILE]

The workload is that of ``train_real_size.py``: real size, random weights, bfloat16, adapters on every linear and
convolution layer of the UNet. Yardsticks, in the same run:

* the frozen UNet, forward and backward to its input, eager and as one CUDA graph: the floor of any adapter;
* with ``--peers`` PEFT's LoRA and LyCORIS' algorithms as their users attach them, forward, backward and fused AdamW
  on fixed inputs: what a trainer adds to that (noise, caches, logging) is left out, which favours them.

lycotool's numbers come from its own loop, everything included. Medians after a warm-up, synchronised.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # this copy, wherever the script is started
# ruff: noqa: E402

import train_real_size as real

ROUNDS = 10
LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"linear_dim": 16, "linear_alpha": 8.0, "conv_dim": 16, "conv_alpha": 8.0},
    "loha": {"linear_dim": 8, "linear_alpha": 4.0, "conv_dim": 8, "conv_alpha": 4.0},
    "lokr": {"linear_dim": 16, "linear_alpha": 8.0, "conv_dim": 16, "conv_alpha": 8.0, "factor": 8},
    "dora": {
        "algo": "lora",
        "linear_dim": 16,
        "linear_alpha": 8.0,
        "conv_dim": 16,
        "conv_alpha": 8.0,
        "dora_wd": True,
    },
    "glora": {"linear_dim": 16, "linear_alpha": 8.0, "conv_dim": 16, "conv_alpha": 8.0},
    "ia3": {"linear_dim": 16, "conv_dim": 16},
    "diag-oft": {"linear_dim": 16, "conv_dim": 16},
    "boft": {"linear_dim": 16, "conv_dim": 16},
    "full": {"linear_dim": 16, "conv_dim": 16},
    "norm": {"linear_dim": 16, "conv_dim": 16, "train_norm": True},
}


class Unet:
    """Fixed inputs for a UNet, and a step on them."""

    def __init__(self, family: str, side: int, batch: int, device: torch.device) -> None:
        base = real.random_base(family, device, torch.bfloat16, micro=False)
        self.model = base.unet
        size = side // 8
        half = {"device": device, "dtype": torch.bfloat16}
        self.x = torch.randn(batch, 4, size, size, **half)
        self.text = torch.randn(batch, 77, self.model.config.cross_attention_dim, **half)
        self.timesteps = torch.randint(0, 1000, (batch,), device=device)
        self.added = None
        if family == "sdxl":
            ids = torch.tensor([[side, side, 0, 0, side, side]] * batch, device=device, dtype=torch.float32)
            self.added = {"text_embeds": torch.randn(batch, 1280, **half), "time_ids": ids}

    def loss(self) -> torch.Tensor:
        y = self.model(
            self.x,
            self.timesteps,
            encoder_hidden_states=self.text,
            added_cond_kwargs=self.added,
            return_dict=False,
        )[0]
        return y.float().square().mean()


def seconds_of(step: Callable[[], object]) -> float:
    """The median after two rounds of warm-up."""
    times = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def graph_of(step: Callable[[], object]) -> Callable[[], object]:
    """The same step, recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def frozen(unet: Unet) -> dict[str, float]:
    """Forward and backward to the input, eager and recorded."""
    unet.x.requires_grad_()

    def step() -> object:
        return torch.autograd.grad(unet.loss(), unet.x)

    found = {"frozen, eager": seconds_of(step), "frozen, graph": seconds_of(graph_of(step))}
    unet.x.requires_grad_(False)
    return found


def trained(unet: Unet, parameters: list[torch.nn.Parameter]) -> Callable[[], object]:
    """A step of a peer: forward, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        unet.loss().backward()
        return optimizer.step()

    return step


def peft_lora(unet: Unet) -> float:
    """PEFT's LoRA on every linear and convolution layer, float32 factors under autocast as in diffusers' scripts."""
    from peft import LoraConfig, inject_adapter_in_model

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in unet.model.named_modules() if isinstance(module, kinds)]
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=8, target_modules=names), unet.model)
    parameters = [parameter for name, parameter in unet.model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    step = trained(unet, parameters)

    def autocast() -> object:
        with torch.autocast("cuda", torch.bfloat16):
            return step()

    return seconds_of(autocast)


def lycoris(unet: Unet, algo: str) -> float:
    """LyCORIS' own network on every linear and convolution layer, as its README attaches it."""
    from lycoris import create_lycoris

    arguments = {"algo": "lora" if algo == "norm" else algo, **LYCORIS[algo]}
    classes = ["GroupNorm", "LayerNorm"] if algo == "norm" else ["Linear", "Conv2d"]
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "preset.toml"
        preset.write_text(f"enable_conv = true\ntarget_module = {json.dumps(classes)}\n", encoding="utf-8")
        network = create_lycoris(unet.model, 1.0, preset=str(preset), **arguments)
    network.apply_to()
    network.cuda().float()
    network.train()
    step = trained(unet, [parameter for parameter in network.parameters() if parameter.requires_grad])

    def autocast() -> object:
        with torch.autocast("cuda", torch.bfloat16):
            return step()

    return seconds_of(autocast)


def main() -> None:
    """Measure, print a table with ratios, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="sdxl", choices=list(real.SIDES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--algo", nargs="+", default=list(real.NETWORK), choices=list(real.NETWORK))
    parser.add_argument("--peers", nargs="*", choices=["peft", *LYCORIS])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, side = torch.device("cuda"), real.SIDES[arguments.family]
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {arguments.family} {side}, batch {arguments.batch}"
    )
    rows: list[tuple[str, float, float]] = []
    floor = float("nan")

    def add(name: str, seconds: float) -> None:
        gib = torch.cuda.max_memory_allocated() / 2**30
        rows.append((name, seconds, gib))
        print(
            f"{name:<28} {1000 * seconds:8.1f} ms  {seconds / floor:6.2f} x floor  {gib:6.2f} GiB", flush=True
        )

    def fresh() -> Unet:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return Unet(arguments.family, side, arguments.batch, device)

    found = frozen(fresh())
    floor = found["frozen, graph"]
    for name, seconds in found.items():
        add(name, seconds)
    for algo in [] if arguments.peers is None else (arguments.peers or ["peft", *LYCORIS]):
        peer = "peft" if algo == "peft" else "lycoris-lora"
        try:
            label = f"{peer} {version(peer)} {'lora' if algo == 'peft' else algo}"
            unet = fresh()
            add(label, peft_lora(unet) if algo == "peft" else lycoris(unet, algo))
        except (ImportError, PackageNotFoundError, RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{peer} {algo}: not measured: {type(error).__name__}: {str(error)[:150]}", flush=True)
        unet = None
    gc.collect()
    base = real.random_base(arguments.family, device, torch.bfloat16, micro=False)
    settings = argparse.Namespace(
        batch=arguments.batch, steps=arguments.steps, precision="bf16", device="cuda"
    )
    with tempfile.TemporaryDirectory() as folder:
        images = real.pictures(Path(folder) / "images", side, max(2, arguments.batch))
        for algo in arguments.algo:
            add(f"lycotool {algo}", real.measure(base, algo, images, side, settings)["seconds"])
    if arguments.json is not None:
        kept = [{"name": name, "seconds": seconds, "gib": gib} for name, seconds, gib in rows]
        arguments.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
