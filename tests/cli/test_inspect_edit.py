"""``inspect --set``, ``--unset`` and ``--strip-training-data``."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, read, run, succeed, write
from safetensors import safe_open

LORA = DATA / "lora.safetensors"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


def test_a_key_is_set_and_another_taken_out(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", lora(), {"keep": "1", "gone": "2", "old": "3"})
    before = source.read_bytes()
    output = tmp_path / "b.safetensors"

    result = succeed("inspect", source, "--set", "new=x=y", "--set", "old=4", "--unset", "gone", "-o", output)

    assert result.stdout == f"{output}\n"
    assert metadata_of(output) == {"keep": "1", "new": "x=y", "old": "4"}
    assert data_of(output) == data_of(source)
    assert source.read_bytes() == before
    assert result.stderr.splitlines() == ["+ new", "~ old", "- gone"]
    for key, tensor in read(source).items():
        assert torch.equal(read(output)[key], tensor)


def test_the_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert succeed("inspect", LORA, "--set", "a=b").stdout == "lora-edited.safetensors\n"
    assert metadata_of(tmp_path / "lora-edited.safetensors")["a"] == "b"


def test_in_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(), {"a": "1"})
    path.chmod(0o640)
    data = data_of(path)
    assert succeed("inspect", path, "--set", "a=2", "--in-place").stdout == f"{path}\n"
    assert metadata_of(path) == {"a": "2"}
    assert data_of(path) == data
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_to_change_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(), {"a": "1"})
    inode = path.stat().st_ino
    result = succeed("inspect", path, "--strip-training-data", "--in-place")
    assert "nothing to change" in result.stderr
    assert path.stat().st_ino == inode


def test_a_pattern_takes_out_many(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(), {"ss_a": "1", "ss_b": "2", "other": "3"})
    succeed("inspect", path, "--unset", "ss_*", "--in-place")
    assert metadata_of(path) == {"other": "3"}


def test_a_file_without_metadata_gets_some(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora())
    succeed("inspect", path, "--set", "a=ü\n“x”", "--in-place")
    assert metadata_of(path) == {"a": "ü\n“x”"}


def test_taking_out_the_last_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(), {"a": "1"})
    succeed("inspect", path, "--unset", "a", "--in-place")
    assert metadata_of(path) == {}


def test_the_data_keeps_its_place_in_the_file_systems_blocks(tmp_path: Path) -> None:
    """Large changes of the header shift the data by whole blocks, which can then be shared."""
    path = write(tmp_path / "a.safetensors", lora())
    place = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for value in ("", "x" * 5000, "y" * 100):
        succeed("inspect", path, "--set", f"a={value}", "--in-place")
        start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        assert (start - place) % 4096 == 0
        assert start - place <= len(value) + 4096


def test_stripping_leaves_what_programs_read(tmp_path: Path) -> None:
    output = tmp_path / "b.safetensors"
    result = succeed("inspect", LORA, "--strip-training-data", "-o", output, "--json")
    before, after = metadata_of(LORA), metadata_of(output)
    assert {key: before[key] for key in after} == after
    assert {
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "sshs_model_hash",
    } <= set(after)
    gone = before.keys() - after.keys()
    assert {
        "ss_tag_frequency",
        "ss_dataset_dirs",
        "ss_sd_model_name",
        "ss_seed",
        "ss_learning_rate",
    } & before.keys() <= gone
    (file,) = json.loads(result.stdout)["files"]
    assert set(file["removed"]) == gone
    assert "training-data" not in run("inspect", output, "--check", "--headers-only").stdout


def test_stripping_keeps_what_is_published(tmp_path: Path) -> None:
    metadata = {
        "modelspec.title": "t",
        "lycotool.version": "1",
        "ot_config": "{}",
        "ss_seed": "1",
        "format": "pt",
    }
    path = write(tmp_path / "a.safetensors", lora(), metadata)
    succeed("inspect", path, "--strip-training-data", "--in-place")
    assert metadata_of(path) == {"modelspec.title": "t", "lycotool.version": "1", "format": "pt"}


def test_the_data_hash_stays_and_the_legacy_hash_follows(tmp_path: Path) -> None:
    """The legacy hash is of bytes of the file as sd-scripts saves it with its ``ss_*`` metadata."""
    from safetensors.torch import save

    tensors = {
        f"lora_unet_{i}.lora_{side}.weight": torch.randn(512, 512)
        for i in range(2)
        for side in ("up", "down")
    }

    def legacy(metadata: dict[str, str]) -> str:
        return hashlib.sha256(save(tensors, metadata)[0x100000:0x110000]).hexdigest()[:8]

    said = {"ss_note": "x" * 100, "ss_seed": "1"}
    hashes = {
        "sshs_model_hash": hashlib.sha256(save(tensors)[8:]).hexdigest(),
        "sshs_legacy_hash": legacy(said),
    }
    path = write(tmp_path / "a.safetensors", tensors, {**said, **hashes})

    succeed("inspect", path, "--set", "title=t", "--in-place")
    assert metadata_of(path)["sshs_legacy_hash"] == legacy(said)
    succeed("inspect", path, "--unset", "ss_note", "--in-place")
    found = metadata_of(path)
    assert found["sshs_legacy_hash"] == legacy({"ss_seed": "1"}) != legacy(said)
    assert found["sshs_model_hash"] == hashes["sshs_model_hash"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(), {"a": "1"})
    before = path.read_bytes()
    result = succeed("inspect", path, "--set", "a=2", "--in-place", "-n")
    assert (result.stdout, result.stderr) == ("", "~ a\n")
    (file,) = json.loads(succeed("inspect", path, "--set", "a=2", "--in-place", "-n", "--json").stdout)[
        "files"
    ]
    assert (file["changed"], file["dry_run"]) == ({"a": ["1", "2"]}, True)
    assert path.read_bytes() == before


def test_several_files_in_place(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, lora(), {"x": "1"}) for name in ("a.safetensors", "b.safetensors")]
    (tmp_path / "c.safetensors").write_bytes(b"broken")
    result = run("inspect", tmp_path, "--unset", "x", "--in-place")
    assert result.exit_code == 3
    assert result.stdout.splitlines() == [str(path) for path in paths]
    assert "c.safetensors" in result.stderr
    assert [metadata_of(path) for path in paths] == [{}, {}]


def test_the_same_edit_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("b", "c"):
        succeed("inspect", LORA, "--set", "z=1", "--set", "a=2", "-o", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_an_output_that_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"old")
    result = run("inspect", LORA, "--set", "a=b", "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 7
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    succeed("inspect", LORA, "--set", "a=b", "-o", tmp_path / "b.safetensors", "--force")
    assert metadata_of(tmp_path / "b.safetensors")["a"] == "b"


def test_the_input_is_replaced_only_by_name_of_the_option(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora())
    result = run("inspect", path, "--set", "a=b", "-o", path, "--force")
    assert result.exit_code == 7
    assert "same file as the input" in result.stderr


def test_a_symlink_is_not_followed_in_place(tmp_path: Path) -> None:
    target = write(tmp_path / "blob.safetensors", lora())
    link = tmp_path / "a.safetensors"
    link.symlink_to(target)
    before = target.read_bytes()
    result = run("inspect", link, "--set", "a=b", "--in-place")
    assert result.exit_code == 7
    assert "symlink" in result.stderr
    assert target.read_bytes() == before


def test_read_only_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors", lora())
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    result = run("inspect", path, "--set", "a=b", "--in-place")
    assert result.exit_code == 7
    assert "read-only" in result.stderr


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", lora(), {"a": "1"})
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    result = run("inspect", path, "--set", "a=2", "--in-place")
    assert result.exit_code == 7
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_without_copy_file_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    succeed("inspect", LORA, "--set", "a=b", "-o", tmp_path / "b.safetensors")
    assert data_of(tmp_path / "b.safetensors") == data_of(LORA)


@pytest.mark.parametrize("number", [18, 22, 38, 95])
def test_where_copy_file_range_cannot(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(number, "cannot")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    succeed("inspect", LORA, "--set", "a=b", "-o", tmp_path / "b.safetensors")
    assert data_of(tmp_path / "b.safetensors") == data_of(LORA)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--set", "novalue"], 2, "expected KEY=VALUE"),
        (["--set", "=x"], 2, "cannot be a metadata key"),
        (["--set", "a=1", "--set", "a=2"], 2, "set twice"),
        (["--set", "a=1", "--unset", "a"], 2, "both set and unset"),
        (["--set", "sshs_model_hash=1"], 2, "computed"),
        (["--set", "a=1", "--in-place", "-o", "x.safetensors"], 2, "exclude each other"),
        (["--set", "a=1", "-o", "-"], 2, "edited in files"),
        (["--set", "a=1", "-o", "x.ckpt"], 2, "unknown output format"),
        (["--set", "a=1", "--stats"], 2, "--stats"),
        (["--set", "a=1", "--modules"], 2, "--modules"),
        (["--unset", "nothere"], 5, "no metadata key nothere"),
        (["--set", "a=\udc80"], 2, "Unicode"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_edits_that_cannot_be(options: list[str], code: int, words: str, tmp_path: Path) -> None:
    result = run("inspect", write(tmp_path / "a.safetensors", lora(), {"k": "v"}), *options)
    assert result.exit_code == code
    assert words in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_several_files_have_no_one_output(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, lora()) for name in ("a.safetensors", "b.safetensors")]
    assert run("inspect", *paths, "--set", "a=b", "-o", "x.safetensors").exit_code == 2


def test_folders_and_shards_are_not_edited(tmp_path: Path) -> None:
    assert run("inspect", DATA / "peft_lora", "--set", "a=b").exit_code == 5
    write(tmp_path / "m-1.safetensors", checkpoint())
    index = {"weight_map": dict.fromkeys(checkpoint(), "m-1.safetensors")}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    result = run("inspect", tmp_path / "m.safetensors.index.json", "--set", "a=b")
    assert result.exit_code == 5
    assert "sharded checkpoint" in result.stderr


def test_a_pickle_is_not_edited(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    assert run("inspect", tmp_path / "a.pt", "--set", "a=b").exit_code == 4


def test_standard_input_needs_a_name(tmp_path: Path) -> None:
    content = write(tmp_path / "a.safetensors", lora()).read_bytes()
    assert run("inspect", "-", "--set", "a=b", input=content).exit_code == 2
    assert run("inspect", "-", "--set", "a=b", "--in-place", input=content).exit_code == 2
    result = run("inspect", "-", "--set", "a=b", "-o", tmp_path / "b.safetensors", input=content)
    assert result.exit_code == 0, result.stderr
    assert metadata_of(tmp_path / "b.safetensors") == {"a": "b"}


def test_a_header_too_long_for_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lycotool.io import rewrite

    monkeypatch.setattr(rewrite, "MAX_HEADER_BYTES", 1000)
    result = run("inspect", LORA, "--set", "a=b", "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 7
    assert "readers refuse it" in result.stderr
