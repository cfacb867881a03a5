"""The rules `merge` and `resize` obey, as data."""

import pytest

from lycotool.algorithms import ALGORITHMS, BY_METADATA, SLOT_NAMES, dora
from lycotool.algorithms.base import Algorithm, Rule

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)

#: The product's own table: mergeable without and with use_conv_cp, resizable by SVD. None
#: where an algorithm has no such form.
TABLE: dict[str, tuple[bool, bool | None, bool, bool | None]] = {
    # name:     merge, merge cp, resize, resize cp
    "lora":     (True, True, True, True),
    "loha":     (True, False, False, False),
    "ia3":      (False, None, False, None),
    "lokr":     (False, False, False, False),
    "dylora":   (True, None, True, None),
    "full":     (True, None, False, None),
    "norm":     (True, None, False, None),
    "glora":    (False, None, False, None),
    "diag-oft": (False, None, False, None),
    "boft":     (False, None, False, None),
    "tlora":    (False, None, False, None),
}  # fmt: skip


def rules(algorithm: Algorithm) -> dict[str, Rule | None]:
    has_cp = any(layout.use_conv_cp for layout in algorithm.layouts)
    return {
        "merge": algorithm.merge,
        "merge cp": (algorithm.merge_conv_cp or algorithm.merge) if has_cp else None,
        "resize": algorithm.resize,
        "resize cp": (algorithm.resize_conv_cp or algorithm.resize) if has_cp else None,
    }


def test_the_rules_are_the_tables() -> None:
    found = {
        algorithm.name: tuple(rule and rule.allowed for rule in rules(algorithm).values())
        for algorithm in ALGORITHMS
    }

    assert {name: found[name] for name in TABLE} == TABLE


def test_nothing_with_dora_is_mergeable_or_resizable() -> None:
    assert not dora.MERGE_RULE.allowed
    assert not dora.RESIZE_RULE.allowed


@each_algorithm
def test_every_rule_has_a_reason(algorithm: Algorithm) -> None:
    for rule in rules(algorithm).values():
        assert rule is None or rule.reason


@each_algorithm
def test_a_refused_merge_names_the_way_on(algorithm: Algorithm) -> None:
    for name in ("merge", "merge cp"):
        rule = rules(algorithm)[name]
        if rule is not None and not rule.allowed:
            assert "--rebuild" in rule.remedy
            assert "lycotool bake" in rule.remedy


def test_refused_dora_names_the_way_on() -> None:
    assert "--rebuild --base" in dora.MERGE_RULE.remedy
    assert "lycotool bake" in dora.MERGE_RULE.remedy
    assert dora.MERGE_RULE.reason
    assert dora.RESIZE_RULE.reason


@each_algorithm
def test_merging_needs_something_to_merge_by(algorithm: Algorithm) -> None:
    """A rule that allows is kept: by exact factors, or by a sum in the same layout."""
    if algorithm.merge.allowed:
        assert algorithm.factors is not None or algorithm.concat is not None
        assert not algorithm.needs_base


@each_algorithm
def test_every_algorithm_says_what_it_is(algorithm: Algorithm) -> None:
    assert algorithm.title.strip()
    assert algorithm.citation.strip()
    assert algorithm.layouts


def test_names_are_unique() -> None:
    names = [algorithm.name for algorithm in ALGORITHMS]

    assert len(set(names)) == len(names)
    for algorithm in ALGORITHMS:
        layouts = [layout.name for layout in algorithm.layouts]
        assert len(set(layouts)) == len(layouts)
    assert all(BY_METADATA[name].name == name for name in BY_METADATA)


@each_algorithm
def test_slot_names_are_known_and_used(algorithm: Algorithm) -> None:
    for layout in algorithm.layouts:
        names = [slot.name for slot in layout.slots]
        assert len(set(names)) == len(names)
        assert layout.names <= SLOT_NAMES
        assert set(layout.linear_in) <= layout.names
        assert layout.required
