"""The same work as others do it, each in a process of its own: ``python -m benchmarks.peers NAME …``.

``plain`` ones are what scripts of the field do, written here; the others call a library.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_there(package: str) -> bool:
    """Whether a package can be imported; nothing is imported."""
    return importlib.util.find_spec(package) is not None


def flush(path: Path) -> None:
    """Have a file on disk, as everything that is compared with it has."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def plain_merge(base: Path, adapter_path: Path, keys: Path, kind: str, output: Path) -> None:
    """Load everything, ``W += c·ΔW`` in float32 one weight at a time, save."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(base)
    adapter = load_file(adapter_path)
    with torch.no_grad():
        for module, (key, rows) in json.loads(keys.read_text()).items():
            part = {
                name.removeprefix(f"{module}."): adapter[name].float()
                for name in [n for n in _SLOTS[kind] if f"{module}.{n}" in adapter]
                for name in [f"{module}.{name}"]
            }
            delta, rank = _CHANGES[kind](part)
            weight = state[key] if rows is None else state[key][rows[0] : rows[1]]
            change = (part["alpha"] / rank) * delta.reshape(weight.shape)
            weight.copy_((weight.float() + change).to(weight.dtype))
    save_file(state, output)
    flush(output)


def _lora(part: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    import torch

    up, down = part["lora_up.weight"], part["lora_down.weight"]
    if "lora_mid.weight" in part:
        whole = torch.einsum("ia,ab...,bj->ij...", up.flatten(1), part["lora_mid.weight"], down.flatten(1))
        return whole, len(down)
    return up.flatten(1) @ down.flatten(1), len(down)


def _loha(part: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    first, second = (part[f"hada_w{n}_a"] @ part[f"hada_w{n}_b"] for n in "12")
    return first * second, len(part["hada_w1_b"])


def _lokr(part: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    import torch

    return torch.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"]), len(part["lokr_w2_b"])


_CHANGES: Mapping[str, Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, int]]] = {
    "locon": _lora, "cp": _lora, "loha": _loha, "lokr": _lokr,
}  # fmt: skip
_SLOTS: Mapping[str, tuple[str, ...]] = {
    "locon": ("lora_up.weight", "lora_down.weight", "alpha"),
    "cp": ("lora_up.weight", "lora_mid.weight", "lora_down.weight", "alpha"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "lokr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
}


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
                gap = (a.float() - b.float()).abs() / b.abs().float().clamp_min(2**-14)
                largest = max(largest, gap.max().item())
    # Neighbouring float16 numbers are at most 2⁻¹⁰ of their size apart.
    if largest > 2**-10:
        raise SystemExit(f"the results differ by {largest}")
    print(json.dumps({"next_float16": changed / total}))


# --- libraries -----------------------------------------------------------------------------


def _unet(base: Path) -> torch.nn.Module:
    """Diffusers' UNet of SD 1.5 with the weights of a folder, without initialising it first."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base, torch_dtype="auto", low_cpu_mem_usage=True)


def make_unet(folder: Path, width: int) -> None:
    """A folder with a UNet of SD 1.5 as diffusers has it, and a LoRA of rank 32 in its names."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768 * width // 320, attention_head_dim=8 if width == 320 else 4,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width), norm_num_groups=32 if width == 320 else 8,
        )  # fmt: skip
    unet = unet.to_empty(device="cpu").half()
    factors = {}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.03)
        for path, module in unet.named_modules():
            if isinstance(module, torch.nn.Linear) and ".attentions." in path:
                out, inside = module.weight.shape
                factors[f"unet.{path}.lora_A.weight"] = torch.randn(32, inside).half() * 0.05
                factors[f"unet.{path}.lora_B.weight"] = torch.randn(out, 32).half() * 0.05
    unet.save_pretrained(folder / "unet")
    save_file(factors, folder / "lora.safetensors")


def diffusers_fuse(folder: Path, output: Path) -> None:
    """``load_lora_adapter``, ``fuse_lora``, ``save_pretrained``."""
    from safetensors.torch import load_file

    unet = _unet(folder / "unet")
    unet.load_lora_adapter(load_file(folder / "lora.safetensors"), prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(output)
    for path in output.glob("*.safetensors"):
        flush(path)


def peft_merge(folder: Path, output: Path) -> None:
    """``get_peft_model``, its weights set, ``merge_and_unload``, ``save_pretrained``."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    factors = {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in
               load_file(folder / "lora.safetensors").items()}  # fmt: skip
    names = sorted({k.removeprefix("base_model.model.").split(".lora_")[0] for k in factors})
    model = get_peft_model(
        _unet(folder / "unet"),
        LoraConfig(r=32, lora_alpha=32, target_modules=names, init_lora_weights=False),
        low_cpu_mem_usage=True,
    )
    set_peft_model_state_dict(model, factors, low_cpu_mem_usage=True)
    model.merge_and_unload().save_pretrained(output)
    for path in output.glob("*.safetensors"):
        flush(path)


def lycoris_merge(folder: Path, output: Path) -> None:
    """``lycoris.utils.merge`` into the UNet, ``save_pretrained``; names as lycoris wants them."""
    import torch
    from lycoris.utils import merge
    from safetensors.torch import load_file

    unet = _unet(folder / "unet")
    factors = {}
    for key, value in load_file(folder / "lora.safetensors").items():
        path, side = key.removeprefix("unet.").rsplit(".lora_", 1)
        slot = "lora_down" if side.startswith("A") else "lora_up"
        name = f"lora_unet_{path.replace('.', '_')}"
        factors[f"{name}.{slot}.weight"] = value
        factors[f"{name}.alpha"] = torch.tensor(32.0)
    merge([], unet, factors)
    unet.save_pretrained(output)
    for path in output.glob("*.safetensors"):
        flush(path)


# --- ranks ---------------------------------------------------------------------------------


def truncated(up: torch.Tensor, down: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way: QR of both factors, SVD of the core."""
    import torch

    left, core_left = torch.linalg.qr(up.flatten(1))
    right, core_right = torch.linalg.qr(down.flatten(1).T)
    u, s, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return left @ (u[:, :rank] * s[:rank]), v[:rank] @ right.T


def plain_resize(source: Path, target: Path, rank: int, device: str) -> None:
    """Load, truncate one module after another, save."""
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
    flush(target)


# --- headers -------------------------------------------------------------------------------


def headers_alone(folder: Path) -> None:
    """Read and parse every header, which no reader can do without."""
    import struct

    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def shapes_by_safe_open(folder: Path) -> None:
    """The shape of every tensor by the library of the format."""
    from safetensors import safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "np") as file:
            file.metadata()
            for name in file.keys():  # noqa: SIM118 - this is not a dictionary
                file.get_slice(name).get_shape()


def read(*paths: Path) -> None:
    """Read the bytes of files."""
    buffer = bytearray(2**24)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    """Be a child."""
    known: dict[str, Callable[..., None]] = {
        "plain-merge": plain_merge, "compare": compare, "make-unet": make_unet, "diffusers": diffusers_fuse,
        "peft": peft_merge, "lycoris": lycoris_merge, "plain-resize": plain_resize, "headers": headers_alone,
        "safe-open": shapes_by_safe_open, "read": read,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=known)
    parser.add_argument("arguments", help="a JSON list; paths begin with a slash")
    options = parser.parse_args()
    values = [
        Path(value) if isinstance(value, str) and value.startswith("/") else value
        for value in json.loads(options.arguments)
    ]
    known[options.name](*values)


if __name__ == "__main__":
    main()
