"""What the README shows works, and its Japanese counterpart says the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import succeed

from lycotool.ops._findings import CHECKS

README = Path(__file__).parents[1] / "README.md"


def commands(marker: str) -> list[str]:
    """The lines of the code block that follows a marker."""
    block = README.read_text(encoding="utf-8").split(f"<!-- {marker} -->")[1].split("```")[1]
    return block.removeprefix("sh\n").strip().splitlines()


def test_worked_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").symlink_to(README.parent / "tests")
    monkeypatch.chdir(tmp_path)
    for line in commands("run: train"):
        program, *arguments = line.split()
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        else:
            assert program == "lycotool"
            succeed(*arguments)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"tests", "base", "cat.safetensors", "small.safetensors", "tuned"}


def test_the_japanese_page_has_the_same_commands() -> None:
    english, japanese = (
        README.with_name(name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md")
    )
    for pattern in (
        r"<!-- run -->\n```console\n.*?```",
        r"<!-- run: train -->\n```sh\n.*?```",
    ):
        found = re.findall(pattern, english, re.DOTALL)
        assert len(found) == 1
        assert re.findall(pattern, japanese, re.DOTALL) == found
    rows = re.findall(r"^\| (`lycotool [a-z]+ [^|]*`) \|", english, re.MULTILINE)
    assert len(rows) == 7
    assert re.findall(r"^\| (`lycotool [a-z]+ [^|]*`) \|", japanese, re.MULTILINE) == rows
    main_job = re.search(r"lycotool merge \S+ \S+$", english, re.MULTILINE)
    assert main_job is not None
    assert main_job[0] in japanese


def test_counts_in_the_japanese_page() -> None:
    text = README.with_name("README.ja.md").read_text(encoding="utf-8")
    assert f"{len(CHECKS)}種類" in text
