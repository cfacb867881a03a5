"""A short share of the fuzzing: ``python -m tests.reliability fuzz`` runs as much as one likes."""

from __future__ import annotations

import contextlib
import time
import unicodedata
from pathlib import Path

import pytest
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.cli._text import clean
from lycotool.errors import LycotoolError
from reliability import corpus, fuzz, guided
from reliability.fuzz import NAMES, Targets, execute


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_errors_on_purpose(name: str, tmp_path: Path) -> None:
    finds: list[str] = []
    count = {"report": 300, "measured": 150, "dialects": 1500, "header": 1500, "terminal": 2000}.get(
        name, 400
    )
    tally = execute(Targets(tmp_path).all()[name], [f"ci-{n}" for n in range(count)], finds)
    assert not finds, "\n".join(finds[:10])
    assert tally.executions == count
    assert name in ("terminal", "dialects") or tally.refused > count // 50
    assert tally.accepted > count // 50


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_kept(name: str, tmp_path: Path) -> None:
    """What coverage has led to, once more; finds that are mended are among them."""
    targets, inputs = Targets(tmp_path), corpus.kept(name)
    assert len(inputs) > 20
    for data in inputs:
        start = time.process_time()
        with contextlib.suppress(LycotoolError):
            guided.execute(fuzz, targets, name, data)
        assert time.process_time() - start < fuzz.LONGEST, data[:200]


@many
@given(st.text(st.characters()))
def test_text_is_harmless_and_told_apart(text: str) -> None:
    """No control, format or separator character; and plain text is as it was."""
    shown = clean(text)
    found = {unicodedata.category(character) for character in shown}
    assert not found & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    if text.isascii() and text.isprintable():
        assert shown == text
