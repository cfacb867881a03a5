"""``lycotool train`` as users type it, on micro models and pictures of 16 pixels."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from helpers import read, run, succeed
from safetensors import safe_open
from training.runs import base_file, write_pictures

SMALL = (
    "--resolution",
    16,
    "--min-bucket-reso",
    16,
    "--bucket-reso-steps",
    8,
    "--batch-size",
    2,
    "--device",
    "cpu",
)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def metadata(path: Path | str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.usefixtures("no_network")
def test_main_job(in_folder: Path) -> None:
    result = succeed("train", base_file("sd1"), "images", *SMALL, "--steps", 2)
    assert result.stdout == "images-lora.safetensors\n"
    tensors = read(in_folder / "images-lora.safetensors")
    assert {key.split("_")[1] for key in tensors} == {"te", "unet"}
    assert all(tensor.dtype == torch.float16 for key, tensor in tensors.items() if "alpha" not in key)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_up" in key)
    assert not (in_folder / "images-lora.state").exists()
    said = metadata(in_folder / "images-lora.safetensors")
    assert said["ss_network_module"] == "networks.lora"
    assert "seed 42" in result.stderr
    assert "83 modules" in result.stderr


def test_dry_run_plans_and_writes_nothing(in_folder: Path) -> None:
    result = succeed("train", base_file("sd1"), "images", *SMALL, "--dry-run", "--algo", "loha", "--json")
    plan = json.loads(result.stdout)["plan"]
    assert [(row["component"], row["algo"], row["modules"]) for row in plan["modules"]] == [
        ("te1", "loha", 12), ("unet", "loha", 83),
    ]  # fmt: skip
    assert plan["steps"] == 1600
    assert plan["memory"]["base"] > 1e6
    assert sorted(path.name for path in in_folder.iterdir()) == ["images"]


def test_json_names_the_output() -> None:
    result = succeed(
        "train", base_file("sd1"), "images", *SMALL, "--steps", 1, "--json", "-o", "a.safetensors"
    )
    document = json.loads(result.stdout)
    assert document["outputs"] == ["a.safetensors"]
    assert document["plan"]["seed"] == 42


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.safetensors", "images"], 2, "absent.safetensors"),
        (["{base}", "absent"], 2, "no such file or folder"),
        (["images/0.png", "images"], 3, ""),
        (["{base}", "empty"], 3, "no images"),
        (["{base}", "images", "--preset", "no-such"], 2, "no preset is named"),
        (["{base}", "images", "--factor", 4], 2, "factor does not apply to lora"),
        (["{base}", "images", "--optimizer", "adamv"], 2, "did you mean adamw"),
        (["{base}", "images", "--optimizer-arg", "decay=1"], 2, "adamw has no argument decay"),
        (["{base}", "images", "--steps", 1, "--epochs", 1], 2, "--steps` and `--epochs"),
        (["{base}", "images", "--zero-terminal-snr"], 2, "epsilon prediction"),
        (["{base}", "images", "--no-train-unet", "--no-train-te"], 2, "nothing is trained"),
        (["{base}", "images", "--no-train-te", "--te-lr", 1], 2, "--te-lr does nothing"),
        (["{base}", "images", "--format", "gguf"], 2, "no such name"),
        (["{base}", "images", "-o", "a.ckpt"], 2, "unknown output format"),
        (["{base}", "images", "-o", "there.safetensors"], 7, "exists already"),
        (["{base}", "images", "-o", "{base}"], 7, "same file as the input"),
        (["{base}", "images", "--device", "cuda:9"], 2, "cuda:9"),
        (["{base}", "images", "--precision", "fp16"], 2, "fp16 is not for the CPU"),
        (["{base}", "images", "--sample-at-first"], 2, "need prompts"),
        (["{base}", "images", "--validate-every-n-steps", 1], 2, "set aside"),
        (["{base}", "images", "--resume", "nowhere"], 2, "no state"),
        (["{base}", "images", "--split-dylora"], 2, "--split-dylora is for"),
        (
            ["{base}", "images", "--lr-scheduler-power", 2],
            2,
            "--lr-scheduler-power does nothing with constant",
        ),
        (["{base}", "images", "--noise-offset-random-strength"], 2, "does nothing without --noise-offset"),
    ],
)
def test_errors_have_their_exit_code(
    in_folder: Path, arguments: list[object], code: int, message: str
) -> None:
    (in_folder / "empty").mkdir()
    (in_folder / "there.safetensors").write_bytes(b"")
    filled = [str(a).format(base=base_file("sd1")) for a in arguments]
    result = run("train", *SMALL, "--lr", 0.001, *filled)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert not result.stdout
