"""``inspect --tags``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import DATA, lora, succeed, write

FREQUENCY = {"3_cat": {"cat": 5, " sitting ": 2}, "1_dog": {"dog": 3, "sitting": 4, "cat": 1}}


def adapter(folder: Path, frequency: object, dirs: object = None) -> Path:
    metadata = {"ss_tag_frequency": json.dumps(frequency)}
    if dirs is not None:
        metadata["ss_dataset_dirs"] = json.dumps(dirs)
    return write(folder / "a.safetensors", lora(), metadata)


def tags(path: Path) -> list[dict]:
    (file,) = json.loads(succeed("inspect", path, "--tags", "--json").stdout)["files"]
    return file["tags"]


def test_data_sets_are_added_up(tmp_path: Path) -> None:
    rows = tags(adapter(tmp_path, FREQUENCY))
    assert [(row["tag"], row["count"], row["datasets"]) for row in rows] == [
        ("cat", 6, 2), ("sitting", 6, 2), ("dog", 3, 1),
    ]  # fmt: skip
    assert rows[0]["share"] is None


def test_shares_are_of_the_images(tmp_path: Path) -> None:
    dirs = {"3_cat": {"n_repeats": 3, "img_count": 5}, "1_dog": {"n_repeats": 1, "img_count": 7}}
    assert tags(adapter(tmp_path, FREQUENCY, dirs))[0]["share"] == 0.5
    assert "50.0 %" in succeed("inspect", tmp_path / "a.safetensors", "--tags").stdout


@pytest.mark.parametrize(("top", "shown"), [(None, 20), (5, 5), (0, 30)])
def test_the_commonest_are_shown(top: int | None, shown: int, tmp_path: Path) -> None:
    path = adapter(tmp_path, {"set": {f"tag{i:02}": 100 - i for i in range(30)}})
    options = [] if top is None else ["--top", top]
    text = succeed("inspect", path, "--tags", *options).stdout
    assert re.findall(r"^tag\d+", text, flags=re.MULTILINE) == [f"tag{i:02}" for i in range(shown)]
    assert ("more (`--top 0` shows all)" in text) == (shown < 30)


@pytest.mark.parametrize(
    "frequency", [{}, [], "text", 3, {"a": 1}, {"a": {"x": "many", "y": True, "z": -1, "w": None}}], ids=str
)
def test_whatever_stands_there_is_no_fault(frequency: object, tmp_path: Path) -> None:
    path = adapter(tmp_path, frequency, ["no", "folders"])
    assert tags(path) == []
    assert "no tags in the metadata" in succeed("inspect", path, "--tags").stdout


def test_without_the_option_none_are_counted(tmp_path: Path) -> None:
    (file,) = json.loads(succeed("inspect", adapter(tmp_path, FREQUENCY), "--json").stdout)["files"]
    assert file["tags"] is None


def test_tags_are_neutralised(tmp_path: Path) -> None:
    text = succeed("inspect", adapter(tmp_path, {"a": {"\x1b[31mred\u202e\n[bold]x": 1}}), "--tags").stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert "[bold]x" in text


def test_the_sample_has_its_tags() -> None:
    assert tags(DATA / "lora.safetensors")[0]["count"] > 0
