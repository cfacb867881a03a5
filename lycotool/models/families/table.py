"""The modules of one network, and where a path is among them.

Two namings exist for every denoiser: ``native``, of the checkpoint its authors published (LDM
and SGM for the Stable Diffusions, BFL's for Flux), and ``diffusers``, of the class in that
library. Where the two cut a matrix differently (a fused ``qkv`` against ``to_q``, ``to_k``,
``to_v``), one rule names all parts. A few families have a third, ``comfy``: ComfyUI renames
some of their native modules.

A path may be dotted, or have ``_`` for its dots. The two forms are not told apart, so both
are looked up by the same key: the path with its numbers taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Naming = Literal["native", "diffusers", "comfy"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One module in every naming.

    Parameters
    ----------
    native
        Dotted path of the module that holds the parameters, ``{}`` for an index. None where
        the published model has no such module.
    diffusers
        Paths of the same rows in diffusers' class, in the order of the rows; several where
        diffusers splits what is fused natively, none where it has no such module.
    rows
        Relative heights of the parts, when there are several.
    swaps_halves
        Whether the upper and the lower half of the rows change places (scale and shift of
        an adaptive norm).
    swaps_only_at_ratio
        When not 0, the halves change places only where the module is this many times as high
        as wide: of SD 3's context blocks, the last alone has one scale and one shift.
    comfy
        ComfyUI's path, where it renames the native module.
    """

    native: str | None
    diffusers: tuple[str, ...]
    rows: tuple[int, ...] = ()
    swaps_halves: bool = False
    swaps_only_at_ratio: int = 0
    comfy: str | None = None

    def __post_init__(self) -> None:
        if len(self.diffusers) > 1 and len(self.rows) != len(self.diffusers):
            raise ValueError(f"{self.native}: {len(self.diffusers)} parts, {len(self.rows)} heights")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a module is in its family.

    ``part`` counts the parts of the rule in diffusers' naming; it is None for the whole
    (the native module, or one that diffusers has whole too).
    """

    rule: Rule
    indices: tuple[int, ...]
    part: int | None

    def path(self, naming: Naming) -> str | None:
        """The site's dotted path in a naming, or None where it has none of its own there."""
        rule = self.rule
        pattern: str | None
        if naming == "diffusers":
            whole = rule.diffusers[0] if len(rule.diffusers) == 1 else None
            pattern = whole if self.part is None else rule.diffusers[self.part]
        elif self.part is not None:
            pattern = None
        else:
            pattern = rule.comfy if naming == "comfy" and rule.comfy is not None else rule.native
        return None if pattern is None else pattern.format(*self.indices)


#: A path with a dot in place of every number and ``_`` for its own dots; and its numbers.
PathKey = tuple[str, tuple[int, ...]]


def path_key(path: str) -> PathKey:
    """What a dotted path and its flattened form have in common.

    >>> path_key("blocks.3.attn1.to_q") == path_key("blocks_3_attn1_to_q")
    True
    """
    pieces = path.replace(".", "_").split("_")
    numbers: list[int] = []
    for place, piece in enumerate(pieces):
        if piece.isdecimal() and _is_index(piece):
            numbers.append(int(piece))
            pieces[place] = "."
    return "_".join(pieces), tuple(numbers)


def _is_index(digits: str) -> bool:
    """Whether digits are written as an index is: no zeros in front, no thousands of them."""
    return digits.isascii() and (digits == "0" or digits[0] != "0") and len(digits) < 6


#: Stands for ``{}`` in the key of a rule's path; no model has so many blocks.
_ANY_INDEX = 99999


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One path of a rule, and which numbers of its key are indices."""

    naming: Naming
    rule: Rule
    part: int | None
    indices: tuple[int, ...]

    def site(self, numbers: tuple[int, ...]) -> Site:
        return Site(self.rule, tuple(numbers[position] for position in self.indices), self.part)


@dataclass(frozen=True)
class ModuleTable:
    """The modules of one network in every naming.

    Parameters
    ----------
    write
        Gives the rules. They are written when first asked for: there are thousands, and most
        commands need one family's or none.
    """

    write: Callable[[], Iterable[Rule]]

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, written once."""
        return tuple(self.write())

    def find(self, path: str) -> list[tuple[Naming, Site]]:
        """Every site a path names, dotted or with ``_`` for every dot.

        One path in several namings with the same meaning is found once, in the first of
        diffusers', native and ComfyUI's.
        """
        key = path_key(path)
        found: dict[Site, Naming] = {}
        for pattern in self._at(key):
            found.setdefault(pattern.site(key[1]), pattern.naming)
        return [(naming, site) for site, naming in found.items()]

    def names(self, key: PathKey) -> set[Naming]:
        """The namings in which a path is a module's; quicker than :meth:`find`."""
        return {pattern.naming for pattern in self._at(key)}

    def _at(self, key: PathKey) -> Iterator[_Pattern]:
        text, numbers = key
        for positions, patterns in self._patterns.get(text, {}).items():
            yield from patterns.get(tuple(numbers[position] for position in positions), ())

    @cached_property
    def _patterns(self) -> dict[str, dict[tuple[int, ...], dict[tuple[int, ...], list[_Pattern]]]]:
        """By text, by the positions of the numbers that are no indices, by those numbers."""
        patterns: dict[str, dict[tuple[int, ...], dict[tuple[int, ...], list[_Pattern]]]] = {}
        for rule in self.rules:
            for naming, part, path in _paths(rule):
                text, numbers = path_key(path.replace("{}", str(_ANY_INDEX)))
                fixed = tuple(at for at, number in enumerate(numbers) if number != _ANY_INDEX)
                indices = tuple(at for at, number in enumerate(numbers) if number == _ANY_INDEX)
                same_text = patterns.setdefault(text, {}).setdefault(fixed, {})
                alike = same_text.setdefault(tuple(numbers[at] for at in fixed), [])
                alike.append(_Pattern(naming, rule, part, indices))
        return patterns


def _paths(rule: Rule) -> Iterator[tuple[Naming, int | None, str]]:
    for number, path in enumerate(rule.diffusers):
        yield "diffusers", number if len(rule.diffusers) > 1 else None, path
    if rule.native is not None:
        yield "native", None, rule.native
    if rule.comfy is not None:
        yield "comfy", None, rule.comfy
