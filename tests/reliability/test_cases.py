"""The table: every case with every verb it applies to, through the real command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from reliability.accounts import contents, unaccounted
from reliability.cases import INPUTS, VERBS, Case, Expected
from reliability.lab import OK, Server, Setting, Snapshot, watched
from reliability.outputs import not_announced
from reliability.table import CASES, RUNS
from reliability.tensors import companions


def arguments(case: Case, verb: str, name: str) -> list[str]:
    """The command line."""
    return [part.replace("{x}", name) for part in (*VERBS[verb], *case.options)]


@pytest.mark.parametrize(
    ("case", "verb", "expected"), RUNS, ids=[f"{case.id}-{verb}" for case, verb, _ in RUNS]
)
def test_case(
    case: Case, verb: str, expected: Expected, server: Server, twin: Server, tmp_path: Path
) -> None:
    companions(tmp_path)
    name = case.make(tmp_path)
    before = watched(tmp_path)
    ended = server.run(tmp_path, arguments(case, verb, name), case.setting)
    assert ended.code in expected.codes, ended.text
    if expected.message:
        said = (ended.stderr + ended.stdout).decode()
        assert re.search(expected.message, said, re.IGNORECASE), ended.text
    before.check(ended, outputs=[case.output])
    assert ended.processor < case.seconds, f"{ended.processor} s: {ended.text}"
    if ended.code == OK and verb in INPUTS and (tmp_path / case.output).exists():
        if case.after is not None:
            case.after(tmp_path)
        said = _again(twin, tmp_path, arguments(case, verb, name), case.output, case.setting)
        if case.is_counted:
            inputs = [
                contents(tmp_path / _without_strength(path.replace("{x}", name))) for path in INPUTS[verb]
            ]
            assert not unaccounted(verb, inputs, contents(tmp_path / case.output), said)  # I8
            assert not not_announced(verb, case.options, inputs, tmp_path / case.output, said)  # I4


def _again(
    twin: Server, folder: Path, argv: Sequence[str], output: str, setting: Setting
) -> dict[str, object]:
    """Run it a second time where strings have other hashes, for the same bytes and the document."""
    first = Snapshot.of(folder).entries[output][-1]
    if "--force" not in argv:
        (folder / output).unlink()
    ended = twin.run(folder, [*argv, "--json"], setting)
    assert ended.code == OK, ended.text
    assert Snapshot.of(folder).entries[output][-1] == first, ended.text  # I10
    return json.loads(ended.stdout)


def _without_strength(name: str) -> str:
    """``a.safetensors:0.5`` without its strength."""
    return re.sub(r"(?<=\.safetensors):.*", "", name)


def test_the_table_is_whole() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
