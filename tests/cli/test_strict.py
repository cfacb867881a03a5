"""Warnings have one prefix, are in `--json`, and are errors with `--strict`, for every command that warns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, run, write
from training.runs import base_file, write_pictures

PREFIX = "lycotool: warning: "

TRAIN = (
    "--resolution",
    16,
    "--min-bucket-reso",
    16,
    "--bucket-reso-steps",
    8,
    "--device",
    "cpu",
    "--dry-run",
)

#: A command that warns, and what it warns of.
CASES = {
    "merge adapters": (("merge", "odd.safetensors", "a.safetensors"), "mystery.tensor: unknown tensor"),
    "merge, a reading": (("merge", "bare.safetensors", "a.safetensors"), "alpha is missing, read as the rank"),
    "merge, underflow": (("merge", "a.safetensors:1e-30", "--te", 1, "a.safetensors:1e-30", "--dtype", "fp16"), "underflow"),
    "merge into a checkpoint": (("merge", "base.safetensors", "odd.safetensors"), "mystery.tensor: unknown tensor"),
    "bake": (("bake", "base.safetensors", "odd.safetensors"), "mystery.tensor: unknown tensor"),
    "bake, a reading": (("bake", "base.safetensors", "bare.safetensors"), "alpha is missing, read as the rank"),
    "bake, a module without a layer": (("bake", "base.safetensors", "more.safetensors"), "1 of 2 modules match no layer"),
    "bake, a rule for nothing": (
        ("bake", "sd.safetensors", "sd_lora.safetensors", "--lbw-rule", "IN05:atn:0.5"),
        "`--lbw-rule IN05:atn:0.5` is for no layer of it",
    ),
    "resize": (("resize", "odd.safetensors", "--rank", 1), "mystery.tensor: unknown tensor"),
    "resize, a rank too many": (("resize", "a.safetensors", "--rank", 64), "rank 64 is more than 1 of 1 modules have"),
    "extract, a pattern for nothing": (
        ("extract", "base.safetensors", "tuned.safetensors", "--exclude", "*attn*"),
        "`--exclude *attn*` fits no layer; layers are named as ",
    ),
    "convert": (("convert", "sd_bare.safetensors", "--to", "comfyui"), "alpha is missing, read as the rank"),
    "inspect": (("inspect", "odd.safetensors"), "mystery.tensor: unknown tensor"),
    "inspect, a reading": (("inspect", "bare.safetensors"), "alpha is missing, read as the rank"),
    "train": (("train", "model.safetensors", "images", "--algo", "loha", "--dim", 64, *TRAIN), "recommend"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strict")
    base = checkpoint()
    write(folder / "base.safetensors", base)
    write(folder / "tuned.safetensors", {key: tensor + 1 for key, tensor in base.items()})
    write(folder / "a.safetensors", lora())
    write(folder / "odd.safetensors", {**lora(), "mystery.tensor": torch.ones(1)})
    write(folder / "bare.safetensors", lora(alpha=None))
    write(folder / "more.safetensors", {**lora(), **lora("lora_unet_elsewhere")})
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    write(folder / "sd_bare.safetensors", lora(layer, alpha=None))
    (folder / "sd.safetensors").symlink_to(DATA / "base.safetensors")
    (folder / "sd_lora.safetensors").symlink_to(DATA / "lora.safetensors")
    write_pictures(folder / "images")
    (folder / "model.safetensors").symlink_to(base_file("sd1"))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_warnings_are_errors_with_strict(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, text = CASES[case]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    dry = () if arguments[0] in ("inspect", "train") or case == "merge, underflow" else ("--dry-run",)
    plain = run(*arguments, *dry)
    assert plain.exit_code == 0, plain.stderr
    warned = [line for line in plain.stderr.splitlines() if text in line]
    assert warned
    assert all(line.startswith(PREFIX) for line in warned)
    assert not any("warning" in line.removeprefix(PREFIX) for line in plain.stderr.splitlines())
    for made in set(folder.rglob("*")) - set(before):
        made.unlink()

    document = json.loads(run(*arguments, *dry, "--json").stdout)
    told = document["files"][0] if "files" in document and arguments[0] == "inspect" else document
    told = told.get("plan", told)
    assert any(text in warning for warning in told["warnings"])
    for made in set(folder.rglob("*")) - set(before):
        made.unlink()

    strict = run(*arguments, "--strict")
    assert strict.exit_code == 5
    assert "lycotool: error: " in strict.stderr
    assert text in strict.stderr
    assert PREFIX not in strict.stderr
    assert sorted(folder.rglob("*")) == before


def test_strict_is_silent_where_nothing_is_to_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, base = DATA / "lora.safetensors", DATA / "base.safetensors"
    for arguments in (
        ("merge", base, adapter, "-n"),
        ("bake", base, adapter, "-n"),
        ("resize", adapter, "--rank", 1, "-n"),
        ("convert", adapter, "--to", "comfyui", "-n"),
        ("inspect", adapter),
        ("inspect", adapter, DATA / "loha.safetensors"),
    ):
        result = run(*arguments, "--strict")
        assert result.exit_code == 0, result.stderr
        assert "warning" not in result.stderr


def test_strict_of_several_files_is_an_error_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = run("inspect", "a.safetensors", "odd.safetensors", "--strict")
    assert result.exit_code == 5
    assert "a.safetensors" in result.stdout
    assert "odd.safetensors: `--strict`" in result.stderr


def test_drop_and_strict_contradict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = run("convert", "a.safetensors", "--to", "peft", "--drop", "--strict")
    assert result.exit_code == 2
    assert "`--drop`" in result.stderr
