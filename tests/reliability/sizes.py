"""Memory that commands take of inputs of any size, beside what each says it takes.

Checkpoints are sparse files: their layers are zeros that take no room on a disk, but for a few.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from reliability.cases import OUT
from reliability.lab import CHECK, OK, Server, Setting
from reliability.tensors import companions, numbers, stored

MIB = 2**20

#: Layers that an adapter changes and that differ between two checkpoints; the rest is zeros.
_CHANGED = 4


@dataclass(frozen=True, slots=True)
class Sized:
    """A command, and the memory it takes at most beside the program itself, as its documentation has it.

    Attributes
    ----------
    layers
        Times the largest layer, in float32.
    files
        Times the adapter, in float32.
    more
        MiB that do not depend on the input.
    """

    argv: tuple[str, ...]
    layers: int = 0
    files: int = 0
    more: int = 32

    def bound(self, layer: int, adapter: int) -> int:
        """In bytes, for a largest layer and an adapter of so many."""
        return self.layers * layer + self.files * adapter + self.more * MIB


#: What `large.safetensors`, `thin.safetensors`, `tuned.safetensors` (checkpoint, adapter for it,
#: other checkpoint) and `heavy.safetensors` (a large adapter) are used for.
SIZED = {
    "inspect": Sized(("inspect", "large.safetensors")),
    "inspect --check": Sized(("inspect", "large.safetensors", "--check"), layers=12),
    "inspect --set": Sized(("inspect", "large.safetensors", "--set", "a=b", "-o", OUT)),
    "bake": Sized(("bake", "large.safetensors", "thin.safetensors", "-o", OUT), layers=6, more=64),
    "merge into a checkpoint": Sized(("merge", "large.safetensors", "thin.safetensors", "-o", OUT), layers=6, more=64),
    "extract": Sized(("extract", "large.safetensors", "tuned.safetensors", "--rank", "4", "-o", OUT), layers=12, more=768),
    "merge": Sized(("merge", "heavy.safetensors", "heavy.safetensors", "-o", OUT), files=4, more=128),
    "merge --rank": Sized(("merge", "heavy.safetensors", "heavy.safetensors", "--rank", "8", "-o", OUT), files=4, more=128),
    "resize": Sized(("resize", "heavy.safetensors", "--rank", "8", "-o", OUT), files=4, more=128),
    "convert": Sized(("convert", "heavy.safetensors", "--to", "diffusers", "--arch", "sd1", "-o", OUT), files=4, more=128),
    "inspect --stats": Sized(("inspect", "heavy.safetensors", "--stats"), files=4, more=256),
    "inspect --check of an adapter": Sized(("inspect", "heavy.safetensors", "--check"), files=4, more=256),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """What a command took.

    Attributes
    ----------
    peak
        Bytes of memory without a file behind it (RssAnon), beyond what the idle program has.
    bound
        What they may be by the command's documentation.
    whole
        RssAnon of the whole process, the program itself included.
    floor
        300 MB and six times the largest tensor in float32, which is asked of ``whole`` for checkpoints.
    """

    name: str
    peak: int
    bound: int
    whole: int
    floor: int
    seconds: float


def measured(
    server: Server, folder: Path, names: list[str], *, megabytes: int, layer: int, adapter: int
) -> Iterator[Measured]:
    """Run commands on a checkpoint and an adapter of so many MiB; the peak and the bounds of each.

    Parameters
    ----------
    layer
        MiB of each of the checkpoint's layers.
    """
    small = folder / "small"
    small.mkdir()
    companions(small)
    idle = server.run(small, ["merge", "base.safetensors", "good.safetensors", "-o", OUT]).peak
    width = int((layer * MIB // 4) ** 0.5)
    sparse_checkpoint(folder / "large.safetensors", megabytes // layer, width, seed=1)
    sparse_checkpoint(folder / "tuned.safetensors", megabytes // layer, width, seed=2)
    adapter_for(folder / "thin.safetensors", width)
    heavy = _heavy(folder / "heavy.safetensors", adapter)
    for name in names:
        sized = SIZED[name]
        ended = server.run(folder, sized.argv, Setting(timeout=3600))
        assert ended.code in (OK, CHECK), ended.text
        (folder / OUT).unlink(missing_ok=True)
        yield Measured(
            name,
            ended.peak - idle,
            sized.bound(layer * MIB, heavy),
            ended.whole,
            300 * 10**6 + 6 * layer * MIB,
            ended.seconds,
        )


def adapter_for(path: Path, width: int) -> None:
    """An adapter of rank 1 for the first layers of :func:`sparse_checkpoint`."""
    thin = {}
    for n in range(_CHANGED):
        thin[f"lora_unet_l{n}.lora_down.weight"] = numbers(1, width, seed=n)
        thin[f"lora_unet_l{n}.lora_up.weight"] = numbers(width, 1, seed=n)
    path.write_bytes(stored(thin))


def sparse_checkpoint(path: Path, layers: int, width: int, *, seed: int) -> None:
    """A checkpoint of layers of ``width`` by ``width``; the first few are numbers, the others a hole."""
    nbytes = 4 * width * width
    header = {
        f"unet.l{n}.weight": {
            "dtype": "F32",
            "shape": [width, width],
            "data_offsets": [n * nbytes, (n + 1) * nbytes],
        }
        for n in range(layers)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for n in range(min(_CHANGED, layers)):
            file.write(numbers(width, width, seed=100 * seed + n).numpy().tobytes())
        file.truncate(start + layers * nbytes)


def _heavy(path: Path, megabytes: int) -> int:
    """An adapter of about so many MiB for layers that Stable Diffusion 1 has; its bytes."""
    blocks = [("down", 0), ("down", 1), ("down", 2), ("up", 1), ("up", 2), ("up", 3)]
    modules = [
        f"lora_unet_{side}_blocks_{block}_attentions_{n}_transformer_blocks_0_attn{k}_to_{x}"
        for side, block in blocks for n in range(2) for k in (1, 2) for x in "qkv"
    ]  # fmt: skip
    width = 1024
    rank = max(8, megabytes * MIB // (len(modules) * 2 * width * 4))
    state = {}
    for seed, module in enumerate(modules):
        state[f"{module}.lora_down.weight"] = numbers(rank, width, seed=2 * seed)
        state[f"{module}.lora_up.weight"] = numbers(width, rank, seed=2 * seed + 1)
        state[f"{module}.alpha"] = torch.tensor(float(rank))
    path.write_bytes(stored(state))
    return path.stat().st_size
