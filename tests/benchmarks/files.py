"""Make what is measured: checkpoints and adapters of real widths with random numbers.

Run as a child, ``python -m benchmarks.files KIND ARGUMENT…``, so that its memory is not the parent's.
``quick`` files have every name and an eighth of the width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.shapes import Shape, checkpoint, layers

#: Kinds of adapters, and what a module of each is in the file.
KINDS = ("locon", "loha", "lokr", "cp")
LOHA_RANK, LOKR_RANK, LOKR_FACTOR = 8, 8, 8

_POOL = 2**22


def narrowed(shape: Shape, quick: bool) -> Shape:
    """An eighth of the width, where there is that much."""
    return tuple(size // 8 if quick and size >= 64 else size for size in shape)


def modules(model: str, *, quick: bool) -> dict[str, Shape]:
    """Weight shape of every adapter module, by its name in sd-scripts' spelling."""
    return {
        path.replace(".", "_"): narrowed(shape, quick) for path, shape in layers(model).items()
    }  # the first dot stands behind lora_unet and lora_te


def module_tensors(kind: str, shape: Shape, rank: int) -> dict[str, Shape]:
    """The tensors of one module over a weight of this shape."""
    out, width, *kernel = shape
    taps = math.prod(kernel)
    ones = (1,) * len(kernel)
    if kind == "cp" and taps > 1:
        return {
            "lora_up.weight": (out, rank, *ones),
            "lora_mid.weight": (rank, rank, *kernel),
            "lora_down.weight": (rank, width, *ones),
        }
    if kind in ("locon", "cp"):
        return {"lora_up.weight": (out, rank, *ones), "lora_down.weight": (rank, width, *kernel)}
    if kind == "loha":
        sides = {"a": (out, LOHA_RANK), "b": (LOHA_RANK, width * taps)}
        return {f"hada_w{number}_{side}": size for number in "12" for side, size in sides.items()}
    rows, columns = math.gcd(LOKR_FACTOR, out), math.gcd(LOKR_FACTOR, width)
    return {
        "lokr_w1": (rows, columns),
        "lokr_w2_a": (out // rows, LOKR_RANK),
        "lokr_w2_b": (LOKR_RANK, width // columns * taps),
    }


def adapter_shapes(
    kind: str, model: str, rank: int, *, quick: bool, count: int | None = None
) -> dict[str, Shape]:
    """The tensors of an adapter of a kind over every layer, or over the first few."""
    found: dict[str, Shape] = {}
    for name, shape in itertools.islice(modules(model, quick=quick).items(), count):
        found |= {f"{name}.{slot}": size for slot, size in module_tensors(kind, shape, rank).items()}
        found[f"{name}.alpha"] = ()
    return found


def write_random(path: Path, shapes: Mapping[str, Shape], std: float, metadata: Mapping[str, str]) -> None:
    """A float16 file; one pool of random numbers serves all tensors, each from its own place on."""
    import numpy as np

    from lycotool.io.writer import FilePlan, TensorPlan, write_file

    pool = np.random.default_rng(1).standard_normal(_POOL, dtype=np.float32)
    values = memoryview((pool * std).astype(np.float16)).cast("B")
    plans = {key: TensorPlan("F16", shape) for key, shape in shapes.items()}

    def produce(key: str) -> Iterator[memoryview]:
        if key.endswith(".alpha"):
            yield memoryview(np.float16(3).tobytes())
            return
        left, start = plans[key].nbytes, 2 * (zlib.crc32(key.encode()) % (_POOL // 2))
        while left:
            piece = values[start : start + left]
            yield piece
            left, start = left - len(piece), 0

    write_file(path, FilePlan(plans, metadata), produce)


def write_checkpoint(path: Path, model: str, quick: bool) -> None:
    """A whole checkpoint in one file."""
    shapes = {key: narrowed(shape, quick) for key, shape in checkpoint(model).items()}
    write_random(path, shapes, 0.03, {"format": "pt"})


def write_adapter(
    path: Path, kind: str, model: str, rank: int, quick: bool, count: int | None = None
) -> None:
    """An adapter over every layer, or over the first few, as its trainer says it in the metadata."""
    module = "networks.lora" if kind == "locon" else "lycoris.kohya"
    metadata = {
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": "3",
        "ss_output_name": kind,
    }
    write_random(path, adapter_shapes(kind, model, rank, quick=quick, count=count), 0.05, metadata)


def write_keys(path: Path, model: str, quick: bool) -> None:
    """The checkpoint's key of every adapter module, for programs that have to be told."""
    from lycotool.models.layers import LayerIndex

    index = LayerIndex({key: narrowed(shape, quick) for key, shape in checkpoint(model).items()})
    keys: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name in modules(model, quick=quick):
        layer = index.find(name)
        if layer is None:
            raise SystemExit(f"{name} has no layer in the checkpoint")
        keys[name] = layer.weight.key, layer.weight.rows
    path.write_text(json.dumps(keys))


def write_pair(base: Path, tuned: Path, model: str, quick: bool, device: str) -> None:
    """The UNet's layers, and the same with what fine-tuning might leave: strong directions and a flat tail."""
    import torch

    from lycotool.io.writer import FilePlan, TensorPlan, write_file

    plans = {
        f"model.diffusion_model.{path.removeprefix('lora_unet.')}.weight": TensorPlan(
            "F16", narrowed(shape, quick)
        )
        for path, shape in layers(model).items()
        if path.startswith("lora_unet.")
    }

    def produce(key: str, is_tuned: bool) -> list[memoryview]:
        rows, *rest = plans[key].shape
        columns = math.prod(rest)
        generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        weight = normal(rows, columns) * 0.03
        if is_tuned:
            weight += normal(rows, 24) @ normal(24, columns) * 2e-4 + normal(rows, columns) * 5e-4
        return [weight.half().cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data]

    for path, is_tuned in ((base, False), (tuned, True)):
        write_file(
            path, FilePlan(plans, {"format": "pt"}), lambda key, is_tuned=is_tuned: produce(key, is_tuned)
        )


# --- many headers --------------------------------------------------------------------------

FOLDER_MODULES = 333


def write_folder(folder: Path, files: int, networks: int) -> None:
    """Adapters whose headers are whole and whose data is a hole, so that they take no room.

    Each is a LoRA over 333 layers of SDXL's UNet and has 999 tensors under sd-scripts' names and
    metadata of its own. There are so many different networks among them, because the files of a
    folder are often epochs of one training; as many as files is the worst case.
    """
    folder.mkdir()
    shapes = list(layers("sdxl").items())[:FOLDER_MODULES]
    for number in range(files):
        network = number % networks
        tensors: dict[str, tuple[str, Shape]] = {}
        for index, (path, shape) in enumerate(shapes):
            rank = 4 + network % 61 + (index % 7 == network // 61)
            name = "lora_unet_" + path.removeprefix("lora_unet.").replace(".", "_")
            if networks == files:  # no two files have a tensor of the same shape and place
                rank += 64 * (network % 3)
            tensors[f"{name}.alpha"] = "F16", ()
            tensors[f"{name}.lora_down.weight"] = "F16", (rank, *shape[1:])
            tensors[f"{name}.lora_up.weight"] = "F16", (shape[0], rank, *(1,) * (len(shape) - 2))
        write_sparse(
            folder / f"{number:04}.safetensors",
            tensors,
            {
                "ss_network_module": "networks.lora",
                "ss_network_dim": "Dynamic",
                "ss_network_alpha": "8.0",
                "ss_output_name": f"style {number}",
                "ss_base_model_version": "sdxl_base_v1-0",
            },
        )


_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def nbytes(tensor: tuple[str, Shape]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return _BYTES[tensor[0]] * math.prod(tensor[1])


def write_sparse(
    path: Path, tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file whose data is a hole: it reads as zeros."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, tensor in tensors.items():
        stop = position + nbytes(tensor)
        header[name] = {"dtype": tensor[0], "shape": list(tensor[1]), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


# --- a transformer in shards ---------------------------------------------------------------

WIDTH, SHARDED_RANK = 3072, 16
SHARD_BYTES = 5 * 10**9


def linears(groups: int) -> Iterator[tuple[str, Shape]]:
    """The linear layers of a Flux.1 with so many double blocks and twice as many single ones."""
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


def transformer(groups: int, kind: str) -> dict[str, tuple[str, Shape]]:
    """Dtype and shape of every tensor; ``fp8`` has scaled float8 weights."""
    tensors: dict[str, tuple[str, Shape]] = {}
    for path, shape in linears(groups):
        tensors[f"{path}.weight"] = ("F8_E4M3" if kind == "fp8" else "BF16", shape)
        if kind == "fp8":
            tensors[f"{path}.scale_weight"] = ("F32", ())
        tensors[f"{path}.bias"] = ("BF16", shape[:1])
    return tensors


def groups_for(gigabytes: float, kind: str) -> int:
    """How many double blocks make so many decimal gigabytes."""
    return max(1, round(gigabytes * 1e9 / sum(map(nbytes, transformer(1, kind).values()))))


def write_sharded(folder: Path, groups: int, kind: str) -> None:
    """A transformer in shards of 5 GB with its index, all holes, and a LoRA for every linear layer."""
    import numpy as np

    folder.mkdir()
    shards: list[dict[str, tuple[str, Shape]]] = [{}]
    filled = 0
    for name, tensor in transformer(groups, kind).items():
        if filled and filled + nbytes(tensor) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += nbytes(tensor)
    weights = {}
    for number, shard in enumerate(shards):
        write_sparse(folder / f"in-{number}.safetensors", shard)
        weights |= dict.fromkeys(shard, f"in-{number}.safetensors")
    (folder / "in.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    pool = np.random.default_rng(1).standard_normal(SHARDED_RANK * 8 * WIDTH).astype(np.float16)
    shapes: dict[str, Shape] = {}
    for layer, (rows, columns) in linears(groups):
        name = "lora_unet_" + layer.replace(".", "_")
        shapes |= {
            f"{name}.lora_up.weight": (rows, SHARDED_RANK),
            f"{name}.lora_down.weight": (SHARDED_RANK, columns),
        }
    from safetensors.numpy import save_file

    save_file(
        {key: pool[: math.prod(size)].reshape(size) for key, size in shapes.items()},
        folder / "lora.safetensors",
    )


def main() -> None:
    """Make one file, or one folder."""
    makers: dict[str, Callable[..., None]] = {
        "checkpoint": write_checkpoint, "adapter": write_adapter, "keys": write_keys, "pair": write_pair,
        "folder": write_folder, "sharded": write_sharded,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=makers)
    parser.add_argument("arguments", help="a JSON list")
    options = parser.parse_args()
    kind = options.kind
    paths = 2 if kind == "pair" else 1
    values = json.loads(options.arguments)
    makers[kind](*map(Path, values[:paths]), *values[paths:])


if __name__ == "__main__":
    main()
