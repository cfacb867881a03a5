"""Prompt files in sd-scripts' three formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lycotool.errors import BadInputError, UsageError
from lycotool.training.prompts import Prompt, parse_line, read_prompts

LINE = "a cat, sitting --n blurry, --bad -- --w 640 --h 512 --d 7 --s 20 --l 5.5 --ss k_euler_a"
CAT = Prompt(
    prompt="a cat",
    negative_prompt="blurry",
    width=640,
    seed=7,
    sample_steps=20,
    scale=5.5,
    sample_sampler="euler_a",
)


def test_a_line_with_all_flags() -> None:
    line = "a cat --n blurry --w 640 --d 7 --s 20 --l 5.5 --ss k_euler_a"
    assert parse_line(line) == CAT


def test_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text(
        "# comment\n\na dog\n  a cat --n blurry --w 640 --d 7 --s 20 --l 5.5 --ss euler_a\n", encoding="utf-8"
    )
    assert read_prompts(str(file)) == (Prompt(prompt="a dog"), CAT)


def test_a_toml_file_has_common_values(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(
        '[prompt]\nwidth = 640\nscale = 5.5\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nseed = 3\n'
    )
    assert read_prompts(str(file)) == (
        Prompt(prompt="a", width=640, scale=5.5), Prompt(prompt="b", width=640, scale=5.5, seed=3),
    )  # fmt: skip


def test_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(["a --s 3", {"prompt": "b", "height": 512}]))
    assert read_prompts(str(file)) == (Prompt(prompt="a", sample_steps=3), Prompt(prompt="b", height=512))


@pytest.mark.parametrize(
    ("line", "message"),
    [("a --cn x.png", "--cn x.png is not understood"), ("a --w wide", "expected a number"), ("a --w 4", "at least 8"),
     ("a --s 0", "expected 1 to 1000"), ("a --ss magic", "no such sampler"), ("a --n", "not understood"), (LINE, "--bad")],
)  # fmt: skip
def test_lines_that_are_not_understood(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_line(line)
    assert message in caught.value.message


def test_files_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_prompts(str(tmp_path / "absent.txt"))
    (tmp_path / "p.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="no prompt"):
        read_prompts(str(tmp_path / "p.txt"))
    for text in ("{", '{"a": 1}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(BadInputError):
            read_prompts(str(tmp_path / "p.json"))
