"""What the README says of the registry is what the registry says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import succeed

from lycotool.algorithms import ALGORITHMS, dora
from lycotool.algorithms.base import Algorithm
from lycotool.formats.dialects import DIALECTS, Dialect
from lycotool.linalg.merging.base import Method
from lycotool.linalg.merging.methods import METHODS, OPTIONS
from lycotool.ops._findings import CHECKS

README = Path(__file__).parents[1] / "README.md"


def commands(marker: str) -> list[str]:
    """The lines of the code block that follows a marker."""
    block = README.read_text(encoding="utf-8").split(f"<!-- {marker} -->")[1].split("```")[1]
    return block.removeprefix("sh\n").strip().splitlines()


def yes(allowed: bool) -> str:
    return "yes" if allowed else "no"


def row(algorithm: Algorithm) -> str:
    has_cp = any(layout.use_conv_cp for layout in algorithm.layouts)
    cp = yes((algorithm.merge_conv_cp or algorithm.merge).allowed) if has_cp else "–"
    return f"| {algorithm.name} | {yes(algorithm.merge.allowed)} | {cp} | {yes(algorithm.resize.allowed)} |"


def test_rules_table() -> None:
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- table: rules -->")[1].split("<!-- end -->")[0].strip().splitlines()
    refused = yes(dora.MERGE_RULE.allowed)
    last = f"| anything with DoRA | {refused} | {refused} | {yes(dora.RESIZE_RULE.allowed)} |"
    assert table[2:] == [*(row(algorithm) for algorithm in ALGORITHMS), last]


def test_formats_table() -> None:
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- table: formats -->")[1].split("<!-- end -->")[0].strip().splitlines()
    names = [algorithm.name for algorithm in ALGORITHMS]

    def line(dialect: Dialect) -> str:
        algorithms = ", ".join(sorted(dialect.algorithms, key=names.index))
        axes = ", ".join(sorted(dialect.dora_axes, reverse=True)) or "no"
        return f"| `{dialect.name}` | {dialect.title} | {algorithms} | {yes(dialect.use_conv_cp)} | {axes} |"

    assert sorted(table[2:]) == sorted(line(dialect) for dialect in DIALECTS.values())


def test_methods_table() -> None:
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- table: methods -->")[1].split("<!-- end -->")[0].strip().splitlines()

    def line(method: Method) -> str:
        options = ", ".join(f"`--{option}`" for option in OPTIONS if option in method.options)
        count = "two" if method.adapters == (2, 2) else "any"
        return f"| `{method.name}` | {method.summary} | {count} | {options or '–'} | {method.citation} |"

    assert table[2:] == [line(method) for method in METHODS.values()]


def test_checks_table() -> None:
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- table: checks -->")[1].split("<!-- end -->")[0].strip().splitlines()
    assert table[2:] == [f"| `{id}` | {c.severity} | {c.reads} | {c.finds} |" for id, c in CHECKS.items()]


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


def test_counts_in_the_japanese_page() -> None:
    text = README.with_name("README.ja.md").read_text(encoding="utf-8")
    assert f"{len(CHECKS)}種類" in text
