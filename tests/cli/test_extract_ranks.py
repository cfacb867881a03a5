"""``extract`` by several processes: the same bytes as by one, one voice, one end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import run, write
from ranks import lycotool, run_ranks


def checkpoints(folder: Path) -> None:
    """A denoiser with layers alike and layers alone, with and without biases, and a tuned one."""
    torch.manual_seed(3)
    base: dict[str, torch.Tensor] = {}
    for block in range(6):
        path = f"unet.blocks.{block}"
        base |= {
            f"{path}.q.weight": torch.randn(24, 24),
            f"{path}.k.weight": torch.randn(24, 24),
            f"{path}.fc.weight": torch.randn(40, 24 + block),
            f"{path}.fc.bias": torch.randn(40),
            f"{path}.conv.weight": torch.randn(16, 8, 3, 3),
            f"{path}.norm.weight": torch.randn(24),
            f"{path}.norm.bias": torch.randn(24),
        }
    tuned = {
        key: value + 0.1 * torch.randn_like(value) * (torch.rand(()) > 0.2) for key, value in base.items()
    }
    write(folder / "base.safetensors", {key: value.half() for key, value in base.items()})
    write(folder / "tuned.safetensors", {key: value.half() for key, value in tuned.items()})


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("--rank", 4)),
        (3, ("--rank", 4, "--use-conv-cp", "--dtype", "fp32")),
        (2, ("--mode", "error", "--error", 0.3)),
        (3, ("--mode", "size", "--size", "30000")),
        (2, ("--algo", "dora", "--rank", 4)),
        (2, ("--algo", "full", "--min-diff", 0.01)),
    ],
    ids=str,
)
def test_the_same_bytes(
    ranks: int, options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path)
    command = [
        "extract",
        "base.safetensors",
        "tuned.safetensors",
        *options,
        "--device",
        "cpu",
        "--json",
        "-o",
    ]
    alone = run(*command, "alone.safetensors")
    assert alone.exit_code == 0, alone.stderr
    first, *others = run_ranks(tmp_path, lycotool, [*command, "together.safetensors"], ranks=ranks)
    assert [end.code for end in (first, *others)] == [0] * ranks, first.stderr
    assert (tmp_path / "together.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert first.stdout.replace("together.", "alone.") == alone.stdout
    assert [(end.stdout, end.stderr) for end in others] == [("", "")] * (ranks - 1)


def test_one_failure_ends_all_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that only one of them reads is not finite."""
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path)
    base = {"unet.a.weight": torch.randn(24, 24), "unet.b.weight": torch.randn(16, 16)}
    write(tmp_path / "base.safetensors", base)
    write(tmp_path / "tuned.safetensors", {**base, "unet.b.weight": torch.full((16, 16), torch.inf)})
    ends = run_ranks(
        tmp_path, lycotool, ["extract", "base.safetensors", "tuned.safetensors", "--device", "cpu", "-o", "x.safetensors"]
    )  # fmt: skip
    assert [end.code for end in ends] == [6, 6]
    said = [line for end in ends for line in end.stderr.splitlines() if "error" in line]
    assert len(said) == 1
    assert "unet.b.weight" in said[0]
    assert [end.stdout for end in ends] == ["", ""]
    assert not (tmp_path / "x.safetensors").exists()


def test_standard_input_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path)
    ends = run_ranks(tmp_path, lycotool, ["extract", "-", "tuned.safetensors", "-o", "x.safetensors"])
    assert [end.code for end in ends] == [2, 2]
    assert sum("standard input" in end.stderr for end in ends) == 1
