"""What several test modules share: running the command line, small files."""

from __future__ import annotations

from pathlib import Path

import torch
from prepared import build_commands_once
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from lycotool.cli import app

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).parent / "golden"

build_commands_once()


def run(*arguments: object, input: bytes | None = None) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def succeed(*arguments: object) -> Result:
    """Run the command line and demand exit code 0."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file with the reference implementation."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file with the reference implementation."""
    return load_file(path)


def lora(
    module: str = "lora_unet_down_a", out: int = 6, width: int = 5, rank: int = 2, alpha: float | None = 1.0
) -> dict[str, torch.Tensor]:
    """A small LoRA module with random factors."""
    tensors = {
        f"{module}.lora_up.weight": torch.randn(out, rank),
        f"{module}.lora_down.weight": torch.randn(rank, width),
    }
    return tensors if alpha is None else {**tensors, f"{module}.alpha": torch.tensor(alpha)}


def checkpoint(out: int = 6, width: int = 5) -> dict[str, torch.Tensor]:
    """A checkpoint of one UNet layer and one tensor no adapter touches."""
    return {
        "model.diffusion_model.down.a.weight": torch.randn(out, width),
        "model.diffusion_model.down.a.bias": torch.randn(out),
        "first_stage_model.untouched.weight": torch.randn(3),
    }
