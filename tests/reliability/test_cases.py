"""The table: every case with every verb it applies to, through the real command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reliability.cases import VERBS, Case, Expected
from reliability.lab import Server, watched
from reliability.table import CASES, RUNS
from reliability.tensors import companions


def arguments(case: Case, verb: str, name: str) -> list[str]:
    """The command line."""
    return [part.replace("{x}", name) for part in (*VERBS[verb], *case.options)]


@pytest.mark.parametrize(
    ("case", "verb", "expected"), RUNS, ids=[f"{case.id}-{verb}" for case, verb, _ in RUNS]
)
def test_case(case: Case, verb: str, expected: Expected, server: Server, tmp_path: Path) -> None:
    companions(tmp_path)
    name = case.make(tmp_path)
    before = watched(tmp_path)
    ended = server.run(tmp_path, arguments(case, verb, name), case.setting)
    assert ended.code in expected.codes, ended.text
    if expected.message:
        said = (ended.stderr + ended.stdout).decode()
        assert re.search(expected.message, said, re.IGNORECASE), ended.text
    before.check(ended, outputs=[case.output])
    assert ended.seconds < case.seconds, f"{ended.seconds} s: {ended.text}"
    if case.after is not None and ended.code == 0 and (tmp_path / case.output).exists():
        case.after(tmp_path)


def test_the_table_is_whole() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
