"""``inspect --blocks`` and ``--hashes``."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from helpers import DATA, succeed, write
from safetensors import safe_open

LORA = DATA / "lora.safetensors"


def inspected(path: Path, *options: str) -> dict:
    (report,) = json.loads(succeed("inspect", path, *options, "--json").stdout)["files"]
    return report


def test_every_module_is_in_a_block_once() -> None:
    report = inspected(LORA, "--blocks")
    blocks = {row["block"]: row for row in report["blocks"]}

    assert sum(row["modules"] for row in blocks.values()) == 354
    assert sum(row["parameters"] for row in blocks.values()) == report["parameters"]
    assert next(iter(blocks)) == "BASE"
    assert list(blocks)[-1] == "-"  # time embeddings and the last convolution
    assert blocks["BASE"]["modules"] == 72
    assert len(blocks) == 26 + 1
    assert blocks["IN00"]["types"] == {"lora": 1}


def test_blocks_of_a_family_without_a_list_have_labels_too(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.{}.self_attn.q"
    tensors = {
        f"{name.format(block)}.lora_{side}.weight": torch.ones(2, 2)
        for block in (0, 11)
        for side in ("up", "down")
    }
    report = inspected(write(tmp_path / "wan.safetensors", tensors), "--blocks")

    assert [row["modules"] for row in report["blocks"]] == [1, 1]


def test_without_the_options_there_are_none() -> None:
    report = inspected(LORA)

    assert report["blocks"] is None
    assert report["hashes"] is None


def test_hashes(tmp_path: Path) -> None:
    resized = tmp_path / "resized.safetensors"
    succeed("resize", LORA, "--rank", 2, "-o", resized)
    content = resized.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]

    (row,) = inspected(resized, "--hashes")["hashes"]

    assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert row["autov2"] == row["sha256"][:10]
    assert row["data_sha256"] == hashlib.sha256(content[start:]).hexdigest()
    assert row["autov3"] == row["data_sha256"][:12]
    with safe_open(resized, "pt") as file:
        assert row["stored"] == file.metadata()["sshs_model_hash"] == row["data_sha256"]
    assert row["stale"] is False
    assert "(right)" in succeed("inspect", resized, "--hashes").stdout


@pytest.mark.parametrize(
    ("stored", "stale", "text"), [("e3b0c442", True, "(stale"), ("0x1234", False, "LyCORIS' own")]
)
def test_a_stored_hash_of_something_else(stored: str, stale: bool, text: str, tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_in.lora_up.weight": torch.ones(2, 1),
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, 2),
    }
    path = write(tmp_path / "x.safetensors", tensors, {"sshs_model_hash": stored})

    (row,) = inspected(path, "--hashes")["hashes"]

    assert row["stale"] is stale
    assert text in succeed("inspect", path, "--hashes").stdout
