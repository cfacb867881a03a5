"""TOML files: read, absent, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from lycotool.errors import BadInputError, UsageError
from lycotool.io.toml import read_toml


def test_reads_tables_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('a = 1\n[b]\nc = "ü"\n', encoding="utf-8-sig")
    assert read_toml(file) == {"a": 1, "b": {"c": "ü"}}


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize("content", [b"a = \n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(BadInputError):
        read_toml(file)
