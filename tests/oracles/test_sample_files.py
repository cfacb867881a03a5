"""The sample adapters of sd-scripts' naming, against float64 arithmetic written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from makers import architectures as arch
from makers.ldm_names import unet_to_ldm
from safetensors.torch import load_file
from torch import Tensor

from oracles.support import bake, half_steps

DATA = Path(__file__).resolve().parents[1] / "data"
BASE, LORA, LOHA = (DATA / f"{name}.safetensors" for name in ("base", "lora", "loha"))
MODULES = 354

# lycotool computes in float32 and rounds once to float16; here the sum is taken in float64.
# float32's error of a few units is 2⁻¹³ of float16's, so about one result in a thousand is
# near enough to the middle of two float16 numbers to be rounded to the other one.
OTHER_NEIGHBOUR = 0.002


def checkpoint_keys() -> dict[str, str]:
    """sd-scripts' module name of every weight, to the key of the single file."""
    unet, text = arch.sd1_unet().state_dict(), arch.sd1_text_encoder().state_dict()
    ldm = {name: arch.UNET_PREFIX + new for new, name in unet_to_ldm({name: name for name in unet}).items()}
    keys = {f"lora_unet_{_flat(name)}": ldm[name] for name in unet if name.endswith(".weight")}
    return keys | {
        f"lora_te_{_flat(name)}": arch.SD1_CLIP_PREFIX + name for name in text if name.endswith(".weight")
    }


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def changes(adapter: Path) -> dict[str, np.ndarray]:
    """c·ΔW of every module in float64, by checkpoint key, flattened to two dimensions."""
    tensors = {key: value.double().numpy() for key, value in load_file(adapter).items()}
    keys = checkpoint_keys()
    found = {}
    for module in {key.split(".")[0] for key in tensors}:
        if f"{module}.hada_w1_a" in tensors:
            a1, b1, a2, b2 = (tensors[f"{module}.hada_w{n}_{side}"] for n in "12" for side in "ab")
            delta, rank = (a1 @ b1) * (a2 @ b2), len(b1)
        else:
            up, down = (tensors[f"{module}.lora_{side}.weight"] for side in ("up", "down"))
            rank = len(down)
            delta = up.reshape(len(up), rank) @ down.reshape(rank, -1)
        found[keys[module]] = delta * (tensors[f"{module}.alpha"] / rank)
    assert len(found) == MODULES
    return found


@pytest.mark.parametrize(
    "strengths",
    [{LORA: 1.0}, {LOHA: 1.0}, {LORA: 0.7}, {LOHA: -1.5}, {LORA: 0.75, LOHA: 0.5}],
    ids=["lora", "loha", "lora at 0.7", "loha at -1.5", "both"],
)
def test_every_tensor(strengths: dict[Path, float], tmp_path: Path) -> None:
    bake(BASE, strengths, tmp_path / "baked.safetensors")
    before, after = load_file(BASE), load_file(tmp_path / "baked.safetensors")
    assert before.keys() == after.keys()

    total: dict[str, np.ndarray] = {}
    for adapter, strength in strengths.items():
        for key, delta in changes(adapter).items():
            total[key] = total.get(key, 0) + strength * delta
    steps = []
    for key, base in before.items():
        if key not in total:
            assert after[key].dtype == base.dtype
            assert _bytes(after[key]) == _bytes(base)
            continue
        expected = base.double().numpy() + total[key].reshape(base.shape)
        assert after[key].dtype == base.dtype == torch.float16
        # numpy rounds float64 to float16 at once, to the nearest and to even.
        steps.append(half_steps(after[key], torch.from_numpy(expected.astype(np.float16))).flatten())
    distances = torch.cat(steps)
    assert distances.max() <= 1
    assert (distances > 0).double().mean() < OTHER_NEIGHBOUR


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
