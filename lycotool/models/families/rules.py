"""Short ways to write many rules at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from lycotool.models.families.table import Rule


def renamed(names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for modules that are whole in both namings, from native to diffusers' path."""
    return tuple(Rule(native, (diffusers,)) for native, diffusers in names.items())


def same(*paths: str) -> tuple[Rule, ...]:
    """Rules for modules of one name in both namings."""
    return tuple(Rule(path, (path,)) for path in paths)


def under(native: str, diffusers: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules with a beginning put before every path."""
    return tuple(_under(native, diffusers, rules))


def _under(native: str, diffusers: str, rules: Iterable[Rule]) -> Iterator[Rule]:
    for rule in rules:
        yield replace(
            rule,
            native=None if rule.native is None else native + rule.native,
            diffusers=tuple(diffusers + path for path in rule.diffusers),
        )
