"""The merge methods give on a GPU what they give on a CPU; random ones keep the same elements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import lora, read, succeed, write

from lycotool.linalg.merging.base import Change, Settings, Stream
from lycotool.linalg.merging.methods import METHODS
from lycotool.linalg.philox import uniform

pytestmark = pytest.mark.gpu

EPS = torch.finfo(torch.float32).eps
COMBINING = [method for method in METHODS.values() if method.combine is not None]


def test_random_numbers_are_the_same_bits() -> None:
    one, two = (
        uniform(100_003, key=2**63 + 7, stream=3, device=torch.device(name)) for name in ("cpu", "cuda")
    )

    assert torch.equal(one, two.cpu())


@pytest.mark.parametrize("method", COMBINING, ids=lambda method: method.name)
def test_every_method(method: object) -> None:
    """Elementwise work is the same to the bit; angles come from sums in another order."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(320, 640, generator=generator) for _ in range(2)]
    found = []
    for device in ("cpu", "cuda"):
        changes = [Change(t.to(device), 1.0, 0.5, 0.01, 0.15, Stream(9, i)) for i, t in enumerate(x)]
        combine, normalize = method.combine, method.normalize  # type: ignore[attr-defined]
        found.append(combine(changes, Settings(normalize=normalize)).cpu())

    assert torch.equal(found[0] == 0, found[1] == 0)
    assert (found[0] - found[1]).abs().max() <= 8 * EPS * float(found[0].abs().max())


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "dare-ties", "--density", "0.5"),
        ("--method", "magnitude-prune", "--density", "0.9", "--rank", "8"),
        ("--error", "0.2"),
    ],
    ids=str,
)
def test_merge_verifies_on_the_gpu(options: tuple[str, ...], tmp_path: Path) -> None:
    """Against the same in float64 on the CPU, by `--verify`."""
    torch.manual_seed(2)
    inputs = [write(tmp_path / f"{n}.safetensors", lora(out=320, width=640, rank=16)) for n in "ab"]
    output = tmp_path / "out.safetensors"
    succeed("merge", *inputs, *options, "--device", "cuda", "--verify", "-o", output)

    assert read(output)
