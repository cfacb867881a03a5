"""``inspect`` of several files: folders, patterns, order, files that cannot be read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, run, succeed, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three adapters and a checkpoint that every order tells apart."""
    full = {"lora_unet_x.diff": torch.ones(30, 30)}
    write(tmp_path / "b.safetensors", lora("lora_unet_double_blocks_0_img_mlp_0", rank=4))
    write(tmp_path / "a.safetensors", {**lora(rank=2), **lora("lora_unet_y", rank=8), **lora("lora_unet_z")})
    write(tmp_path / "d.safetensors", full)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.safetensors", checkpoint(out=3, width=2))
    (tmp_path / "notes.txt").write_text("no model")
    return tmp_path


def order(*arguments: object) -> str:
    """First letters of the files in the table's order."""
    lines = succeed("inspect", *arguments).stdout.splitlines()[1:]
    return "".join(Path(line.split()[0]).name[0] for line in lines)


def test_a_folder_is_walked_in_order(folder: Path) -> None:
    assert order(folder) == "abdc"
    assert order(folder, "--reverse") == "cdba"


@pytest.mark.parametrize(
    ("key", "up", "down"),
    [
        ("name", "abdc", "cdba"),
        ("size", "cbad", "dabc"),
        ("rank", "dcba", "abdc"),  # equal ones stay in the order of their names
        ("modules", "cbda", "abdc"),
        ("algorithm", "cdab", "abdc"),
    ],
)
def test_sorting(key: str, up: str, down: str, folder: Path) -> None:
    assert order(folder, "--sort", key) == up
    assert order(folder, "--sort", key, "--reverse") == down


def test_sorting_by_architecture(folder: Path) -> None:
    assert order(folder, "--sort", "arch")[0] == "b"  # Flux.1 before unknown


def test_sorting_by_strength(folder: Path) -> None:
    assert order(folder, "--sort", "strength", "--reverse", "--stats", "--device", "cpu")[0] == "d"


KINDS = {
    "lora": lora(),
    "without alpha": lora(alpha=None),
    "two ranks": {**lora(rank=2), **lora("lora_unet_y", rank=8), **lora("lora_te_z", rank=8)},
    "dora": {**lora(), "lora_unet_down_a.dora_scale": torch.ones(6, 1)},
    "full and norm": {"lora_unet_x.diff": torch.ones(3, 3), "lora_unet_n.w_norm": torch.ones(3)},
    "lokr": {"lora_unet_k.lokr_w1": torch.ones(2, 2), "lora_unet_k.lokr_w2": torch.ones(2, 2)},
    "peft names": {"base_model.model.x.lora_A.weight": torch.ones(1, 3), "base_model.model.x.lora_B.weight": torch.ones(3, 1)},
    "leftovers": {**lora(), "mystery": torch.ones(2)},
    "faults": {**lora(), "lora_unet_b.lora_up.weight": torch.ones(2, 1)},
    "a mismatch": {**lora(), "lora_unet_down_a.lora_down.weight": torch.ones(3, 5)},
    "float8": {k: t.to(torch.float8_e4m3fn) if "lora" in k.split(".")[1] else t for k, t in lora().items()},
    "integers": {**lora(), "lora_unet_down_a.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)},
    "checkpoint": checkpoint(),
    "empty": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "metadata",
    [None, {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.dylora"}],
    ids=["", "dylora"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_short_way_says_what_the_long_one_does(
    kind: str, metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    from lycotool.ops._inspect_overview import overview, overview_of
    from lycotool.ops.inspect import InspectOptions, inspect

    path = str(write(tmp_path / "a.safetensors", KINDS[kind], metadata))
    assert overview(path, InspectOptions()) == overview_of(inspect(path))


@pytest.mark.parametrize("name", ["lora.safetensors", "loha.safetensors", "base.safetensors", "peft_lora"])
def test_of_the_samples_too(name: str) -> None:
    from lycotool.ops._inspect_overview import overview, overview_of
    from lycotool.ops.inspect import InspectOptions, inspect

    assert overview(str(DATA / name), InspectOptions()) == overview_of(inspect(str(DATA / name)))


def test_json_is_sorted_too(folder: Path) -> None:
    found = json.loads(succeed("inspect", folder, "--sort", "size", "--json").stdout)["files"]
    assert [file["bytes"] for file in found] == sorted(file["bytes"] for file in found)


def test_a_peft_folder_is_one_model(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", lora())
    shutil.copytree(DATA / "peft_lora", tmp_path / "sub" / "b")
    lines = succeed("inspect", tmp_path).stdout.splitlines()
    assert [Path(line.split()[0]).name for line in lines[1:]] == ["a.safetensors", "b"]


def test_a_pattern_is_expanded(folder: Path) -> None:
    assert order(folder / "[ab].safetensors", folder / "sub" / "*.safetensors") == "abc"
    assert order(folder / "**" / "*.safetensors") == "abdc"


def test_a_pattern_without_a_match_is_a_missing_file(folder: Path) -> None:
    result = run("inspect", folder / "*.nothing")
    assert result.exit_code == 2
    assert "no such file" in result.stderr


def test_a_file_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "style[v2].safetensors", lora())
    assert "style[v2].safetensors" in succeed("inspect", path).stdout


def test_a_folder_without_models(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert "no safetensors files in there" in result.stderr
    assert "hint: other files are read where they are named" in result.stderr


def test_what_cannot_be_read_is_listed_and_decides_the_exit_code(folder: Path) -> None:
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    result = run("inspect", folder, folder / "missing.safetensors")
    assert result.exit_code == 3
    unreadable = [line for line in result.stdout.splitlines() if "unreadable" in line]
    assert len(unreadable) == 2
    assert [line.split()[0].rpartition("/")[2] for line in unreadable] == [
        "broken.safetensors",
        "missing.safetensors",
    ]
    assert "broken.safetensors: the header is not valid JSON" in result.stderr
    assert "missing.safetensors: no such file" in result.stderr
    assert result.stdout.count("\n") == 1 + 4 + 2
    assert result.stderr.count("lycotool: error:") == 2


def test_json_has_the_errors(folder: Path) -> None:
    (folder / "broken.safetensors").write_bytes(b"")
    result = run("inspect", folder, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert len(document["files"]) == 4
    (error,) = document["errors"]
    assert (Path(error["path"]).name, error["exit_code"]) == ("broken.safetensors", 3)


@pytest.mark.parametrize("option", ["--modules", "--blocks", "--metadata", "--tags", "--hashes"])
def test_what_shows_one_file_is_refused_for_several(option: str) -> None:
    files = (DATA / "lora.safetensors", DATA / "loha.safetensors")
    result = run("inspect", *files, option)
    assert result.exit_code == 2
    assert f"`{option}` shows one FILE; of 2 it goes with `--json`" in result.stderr
    assert run("inspect", *files, option, "--json").exit_code == 0


@pytest.mark.parametrize("option", [[], ["--sort", "size", "--reverse"], ["--modules", "--blocks", "--tags"]])
def test_many_files_are_described_as_each_by_itself(option: list[str], tmp_path: Path) -> None:
    """In a process of its own, which has no torch and so shares the files out among copies of itself."""
    for number in range(100):
        rank = 1 + number % 7
        alike = lora(rank=rank, alpha=None if number % 5 == 0 else float(number % 3))
        write(tmp_path / f"{number:03}.safetensors", alike, {"ss_output_name": f"ä {number}\n"})
    (tmp_path / "050.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "lycotool", "inspect", str(tmp_path), "--json", *option]
    told = subprocess.run(command, capture_output=True, check=False)
    assert told.returncode == 3
    found = json.loads(told.stdout)
    assert told.stdout.decode() == json.dumps(found, indent=2) + "\n"
    alone = [option for option in option if option not in ("--sort", "size", "--reverse")]
    each = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        if path.name != "050.safetensors":
            each += json.loads(succeed("inspect", path, "--json", *alone).stdout)["files"]
    if "--sort" in option:
        each.sort(key=lambda file: -file["bytes"])
    assert found["files"] == each
    assert [error["exit_code"] for error in found["errors"]] == [3]


def test_like_headers_are_told_apart_by_what_they_say(tmp_path: Path) -> None:
    """What one file gave is used for the next only where both say the same."""
    for name, metadata in {
        "a": {},
        "b": {"ss_base_model_version": "sdxl_base_v1-0"},
        "c": {"ss_network_module": "networks.dylora"},
        "d": {},
    }.items():
        write(tmp_path / f"{name}.safetensors", lora("lora_unet_x"), metadata)
    lines = [line.split(None, 1)[1] for line in succeed("inspect", tmp_path).stdout.splitlines()[1:]]
    assert lines[0].split("  ")[0] == lines[3].split("  ")[0] == "adapter"
    assert "SDXL" in lines[1]
    assert "dylora" in lines[2]
    assert "SDXL" not in lines[0] + lines[2] + lines[3]
    assert "dylora" not in lines[0] + lines[1] + lines[3]
