"""Layer-block weights: one factor for each block of a denoiser, and rules for single layers.

The lists are those of sd-webui-lora-block-weight: 17 or 26 numbers for Stable Diffusion 1 and
2, 12 or 20 for SDXL, 61 for Flux, beginning with the text encoders. A shorter list names the
blocks that plain LoRA has; blocks it does not name get 0. Layers outside of all blocks (time
embeddings, the last convolution) are left at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lycotool.models.families import FAMILIES
from lycotool.models.families.locate import Locator


def _numbered(name: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{name}{number:02d}" for number in numbers)


#: Families to block labels by the length of the list.
LAYOUTS: Mapping[frozenset[str], Mapping[int, tuple[str, ...]]] = {
    frozenset({"sd1", "sd2"}): {
        17: ("BASE", *_numbered("IN", 1, 2, 4, 5, 7, 8), "M00", *_numbered("OUT", *range(3, 12))),
        26: ("BASE", *_numbered("IN", *range(12)), "M00", *_numbered("OUT", *range(12))),
    },
    frozenset({"sdxl"}): {
        12: ("BASE", *_numbered("IN", 4, 5, 7, 8), "M00", *_numbered("OUT", *range(6))),
        20: ("BASE", *_numbered("IN", *range(9)), "M00", *_numbered("OUT", *range(9))),
    },
    frozenset({"flux1", "chroma"}): {
        61: ("CLIP", "T5", "IN", *_numbered("D", *range(19)), *_numbered("S", *range(38)), "OUT"),
    },
}

#: What text encoders are called in each layout, by component.
_TEXT_LABELS: Mapping[str, Mapping[str, str]] = {"flux1": {"te1": "CLIP", "te2": "T5"}}
_TEXT_LABEL = "BASE"

#: The extension's named lists, all of 17.
PRESETS: Mapping[str, str] = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}


@dataclass(frozen=True, slots=True)
class LayerRule:
    """A factor for layers of some blocks: ``IN05-OUT05:attn:0.5``.

    ``blocks`` are labels, empty for all; ``pieces`` are parts of layer names, empty for all.
    ``NOT`` in front of either turns it round.
    """

    blocks: frozenset[str]
    not_blocks: bool
    pieces: tuple[str, ...]
    not_pieces: bool
    factor: float

    def applies(self, block: str, path: str) -> bool:
        """Whether the rule is for this layer."""
        in_block = not self.blocks or (block in self.blocks) != self.not_blocks
        in_layer = not self.pieces or any(piece in path for piece in self.pieces) != self.not_pieces
        return in_block and in_layer


class BlockLabels:
    """Which block each module of one family's adapters is in.

    Parameters
    ----------
    family
        Short name of the family.
    """

    def __init__(self, family: str) -> None:
        self._family = FAMILIES[family]
        self._locator = Locator(self._family)
        self._text_labels = _TEXT_LABELS.get(family, {})
        layouts = next((found for families, found in LAYOUTS.items() if family in families), {})
        self._order = layouts[max(layouts)] if layouts else ()

    def of(self, module: str) -> str | None:
        """The label of a module's block; None outside of all blocks."""
        return self.place(module)[0]

    def place(self, module: str) -> tuple[str | None, str]:
        """The block, and the flattened native path that rules look into."""
        places = self._locator.locate(module)
        if not places:
            return None, module
        place = places[0]
        path = str(place.site.path("native") or place.site.path("diffusers") or module).replace(".", "_")
        if place.component != "unet":
            return self._text_labels.get(place.component, _TEXT_LABEL), path
        return self._family.block(place.site), path

    def order(self, label: str) -> tuple[int, str]:
        """Sorts labels as the layout has them, others after them by name."""
        return (self._order.index(label) if label in self._order else len(self._order), label)


class BlockWeights:
    """Factors for the modules of adapters of one family.

    Parameters
    ----------
    family
        Short name of the family.
    weights
        One number for each block, in one of the family's layouts; None is 1 everywhere.
    rules
        ``BLOCKS:LAYERS:factor`` each; later ones override earlier ones and the list.

    Raises
    ------
    ValueError
        If the family has no layout of that length, or a rule cannot be read; the text says
        what was expected.
    """

    def __init__(self, family: str, weights: Sequence[float] | None, rules: Sequence[str] = ()) -> None:
        layouts = next((found for families, found in LAYOUTS.items() if family in families), None)
        if layouts is None:
            known = sorted(name for families in LAYOUTS for name in families)
            raise ValueError(f"no block weights for {family}: there are some for {', '.join(known)}")
        if weights is not None and len(weights) not in layouts:
            expected = " or ".join(map(str, layouts))
            raise ValueError(f"{len(weights)} block weights, expected {expected} for {family}")
        self._order = layouts[max(layouts)]
        self._weights: dict[str, float] | None = None
        if weights is not None:
            given = dict(zip(layouts[len(weights)], weights, strict=True))
            self._weights = {label: given.get(label, 0.0) for label in self._order}
        self._texts = tuple(rules)
        self._rules = [self._rule(text) for text in rules]
        self._labels = BlockLabels(family)

    def factor(self, module: str) -> float:
        """The factor of an adapter's module; 1 for one outside of all blocks."""
        block, path = self._labels.place(module)
        if block is None:
            return 1.0
        factor = 1.0 if self._weights is None else self._weights.get(block, 1.0)
        for rule in self._rules:
            if rule.applies(block, path):
                factor = rule.factor
        return factor

    def idle_rules(self, modules: Iterable[str]) -> list[str]:
        """The rules that are for none of these modules."""
        places = [self._labels.place(module) for module in modules]
        return [
            text
            for text, rule in zip(self._texts, self._rules, strict=True)
            if not any(block is not None and rule.applies(block, path) for block, path in places)
        ]

    def _rule(self, text: str) -> LayerRule:
        fields = text.split(":")
        if len(fields) != 3:
            raise ValueError(f"{text}: expected BLOCKS:LAYERS:factor, such as IN05-OUT05:attn:0.5")
        not_blocks, names = _negated(fields[0])
        not_pieces, pieces = _negated(fields[1])
        blocks = frozenset(label for name in names for label in self._range(name))
        try:
            factor = float(fields[2])
        except ValueError:
            raise ValueError(f"{text}: {fields[2]} is no number") from None
        if not math.isfinite(factor):
            raise ValueError(f"{text}: {fields[2]} is not finite")
        return LayerRule(blocks, not_blocks, tuple(pieces), not_pieces, factor)

    def _range(self, text: str) -> Sequence[str]:
        first, dash, last = text.upper().partition("-")
        for label in (first, last) if dash else (first,):
            if label not in self._order:
                raise ValueError(
                    f"no such block: {label}{_meant(label, self._order)}; they are {', '.join(self._order)}"
                )
        start = self._order.index(first)
        return self._order[start : self._order.index(last) + 1] if dash else [first]


def _negated(field: str) -> tuple[bool, list[str]]:
    words = field.split()
    is_negated = bool(words) and words[0].upper() == "NOT"
    return is_negated, words[1:] if is_negated else words


def _meant(text: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(text.upper(), list(known), 1)
    return f", did you mean {near[0]}?" if near else ""


def parse_weights(text: str) -> list[float]:
    """A list of numbers, or the name of a preset.

    Raises
    ------
    ValueError
        If it is neither: what is wrong, and what could stand there.
    """
    listed = PRESETS.get(text.upper(), text)
    try:
        weights = [float(item) for item in listed.split(",")]
    except ValueError:
        raise ValueError(
            f"{text[:80]} is no list of block weights and no preset{_meant(text, PRESETS)}",
            f"presets are {', '.join(PRESETS)}; a list is numbers with commas, one for each block",
        ) from None
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"block weights must be finite: {text[:80]}")
    return weights
