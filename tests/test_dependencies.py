"""What the package depends on is bounded on both sides, and the lowest versions are those that are tested."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra))
]

LOWEST = {
    (requirement := Requirement(line)).name: next(iter(requirement.specifier)).version
    for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    if not line.startswith("#")
}

#: Tools that look at the source and are no part of a test run, and what the oldest Python alone needs.
NOT_RUN = {"import-linter", "mypy", "ruff", "tomli"}


def bounds(requirement: Requirement) -> dict[str, str]:
    """Versions by operator."""
    return {one.operator: one.version for one in requirement.specifier}


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_both_bounds_are_given(requirement: Requirement) -> None:
    assert bounds(requirement).keys() in ({">=", "<"}, {"=="})


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_the_lowest_version_is_tested(requirement: Requirement) -> None:
    """`.ci/lowest` installs it; of torch it installs a later one, which only must be allowed."""
    if requirement.name in NOT_RUN:
        return
    tested = LOWEST[requirement.name]
    assert requirement.specifier.contains(tested)
    if requirement.name != "torch":
        lowest = bounds(requirement)
        assert Version(tested) == Version(lowest.get(">=", lowest.get("==", "")))


def test_nothing_else_is_pinned() -> None:
    assert LOWEST.keys() == {requirement.name for requirement in ASKED} - NOT_RUN


def test_one_name_has_one_range() -> None:
    """What several extras ask for is the same in each."""
    ranges: dict[str, set[str]] = {}
    for requirement in ASKED:
        ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert all(len(found) == 1 for found in ranges.values())
