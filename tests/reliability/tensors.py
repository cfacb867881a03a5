"""The sound files that cases damage, and raw containers."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

State = dict[str, torch.Tensor]

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
UNET_WEIGHT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
TEXT_WEIGHT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"

METADATA = {
    "ss_network_dim": "4",
    "ss_network_alpha": "4.0",
    "ss_network_module": "networks.lora",
    "ss_base_model_version": "sd_v1",
}


def numbers(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    """Random numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def good(rank: int = 4, width: int = 16, alpha: float = 4.0, dtype: torch.dtype = torch.float32) -> State:
    """A LoRA of two layers that are in :func:`checkpoint`."""
    state: State = {}
    for index, module in enumerate((UNET, TEXT)):
        state[f"{module}.lora_down.weight"] = numbers(rank, width, seed=2 * index + 1).to(dtype)
        state[f"{module}.lora_up.weight"] = numbers(16, rank, seed=2 * index + 2).to(dtype)
        state[f"{module}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return state


def checkpoint() -> State:
    """A checkpoint of three tensors."""
    return {
        UNET_WEIGHT: numbers(16, 16, seed=11, scale=1.0),
        TEXT_WEIGHT: numbers(16, 16, seed=12, scale=1.0),
        "first_stage_model.untouched": numbers(3, seed=13),
    }


def stored(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = METADATA) -> bytes:
    """The bytes of a safetensors file, the same every time: the reference shuffles metadata."""
    data = save({name: tensor.contiguous() for name, tensor in state.items()})
    header = (
        {"__metadata__": dict(sorted(metadata.items())), **header_of(data)} if metadata else header_of(data)
    )
    text = json.dumps(header).encode()
    return rewritten(data, text + b" " * (-len(text) % 8))


def entry(dtype: str, shape: Sequence[int], start: int, stop: int) -> dict[str, object]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def raw(header: bytes | Mapping[str, object], body: bytes = b"", *, length: int | None = None) -> bytes:
    """A container made by hand; ``length`` lies about the header's."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def rewritten(content: bytes, header: bytes) -> bytes:
    """A file with another header over the same data."""
    (length,) = struct.unpack("<Q", content[:8])
    return raw(header, content[8 + length :])


def header_of(content: bytes) -> dict[str, dict[str, object]]:
    """The parsed header of a file."""
    (length,) = struct.unpack("<Q", content[:8])
    found: dict[str, dict[str, object]] = json.loads(content[8 : 8 + length])
    return found


def companions(folder: Path) -> None:
    """The sound files beside a case's input."""
    (folder / "good.safetensors").write_bytes(stored(good()))
    (folder / "base.safetensors").write_bytes(stored(checkpoint(), None))
    tuned = {name: tensor + numbers(*tensor.shape, seed=21) for name, tensor in checkpoint().items()}
    (folder / "tuned.safetensors").write_bytes(stored(tuned, None))
