"""How strong each module of an adapter is: strength, component, block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from lycotool.errors import UsageError
from lycotool.models.block_weights import PRESETS, BlockWeights, parse_weights
from lycotool.models.families.locate import guess_families
from lycotool.models.naming import split_name
from lycotool.ops._adapter import Adapter, AdapterInput
from lycotool.ops._common import AdapterReport, count_labels
from lycotool.ops._render import outline

_MAX_PRESET_BYTES = 2**20

#: Values for a merge method that an adapter may have of its own.
_OWN = ("density", "gamma", "epsilon")


@dataclass(frozen=True, slots=True)
class StrengthOptions:
    """Factors for every adapter of a command, beside each adapter's own.

    ``te`` and ``unet`` are for text encoders and the denoiser; ``lbw`` is a list of block
    weights, the name of a preset, or a file of them (``FILE`` or ``FILE#NAME``); ``lbw_rules``
    are ``BLOCKS:LAYERS:factor``.
    """

    te: float = 1.0
    unet: float = 1.0
    lbw: str | None = None
    lbw_rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weighted:
    """An opened adapter and the strength of each of its modules.

    Attributes
    ----------
    strength
        What the user gave for the whole adapter.
    lbw
        The block weights as text; a list where the user named a file.
    """

    adapter: Adapter
    strength: float
    te: float = 1.0
    unet: float = 1.0
    blocks: BlockWeights | None = field(default=None, compare=False)
    lbw: str | None = None
    lbw_rules: tuple[str, ...] = ()
    named: AdapterInput | None = None

    def of(self, module: str) -> float:
        """The strength of one module."""
        is_text = split_name(module).component in ("te1", "te2", "te3")
        factor = self.te if is_text else self.unet
        return self.strength * factor * (1.0 if self.blocks is None else self.blocks.factor(module))

    @property
    def warnings(self) -> tuple[str, ...]:
        """The adapter's, and of rules that are for none of its layers."""
        idle = [] if self.blocks is None else self.blocks.idle_rules(self.adapter.modules)
        rules = (f"{self.adapter.path}: `--lbw-rule {rule}` is for no layer of it" for rule in idle)
        return (*self.adapter.warnings, *rules)

    @property
    def recipe(self) -> dict[str, object]:
        """What provenance says of it."""
        found: dict[str, object] = {"file": Path(self.adapter.path).name, "strength": self.strength}
        if self.te != 1.0 or self.unet != 1.0:
            found |= {"te": self.te, "unet": self.unet}
        if self.blocks is not None:
            found |= {"lbw": self.lbw, "lbw_rules": list(self.lbw_rules)}
        return found

    @property
    def described(self) -> dict[str, object]:
        """What a recipe says of it beside its file and the rules for all: every factor in effect."""
        said: dict[str, object] = {"strength": self.strength}
        said |= {name: value for name, value in (("te", self.te), ("unet", self.unet)) if value != 1.0}
        if self.lbw is not None:
            said["lbw"] = self.lbw
        return said | {name: value for name in _OWN if (value := getattr(self.named, name, None)) is not None}

    @property
    def report(self) -> AdapterReport:
        """What reports say of it when every module has its place."""
        count = len(self.adapter.modules)
        labels = count_labels(self.adapter)
        return AdapterReport(self.adapter.path, self.strength, count, count, (), labels)


def weigh(adapter: Adapter, named: AdapterInput, options: StrengthOptions) -> Weighted:
    """An adapter with its own factors and the command's.

    Raises
    ------
    UsageError
        If block weights cannot be read, or do not fit the adapter's model.
    """
    for name, value in (
        ("te", named.te),
        ("unet", named.unet),
        ("--te", options.te),
        ("--unet", options.unet),
    ):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name} is {value}, expected a finite number", path=named.path)
    text = named.lbw if named.lbw is not None else options.lbw
    blocks = None
    if text is not None or options.lbw_rules:
        family = _family(adapter)
        try:
            text = None if text is None else _from_file(text)
            weights = None if text is None else parse_weights(text)
            blocks = BlockWeights(family, weights, options.lbw_rules)
        except ValueError as error:
            message, *hint = map(str, error.args)
            raise UsageError(message, path=named.path, hint=hint[0] if hint else None) from None
    return Weighted(
        adapter,
        named.strength,
        options.te * (1.0 if named.te is None else named.te),
        options.unet * (1.0 if named.unet is None else named.unet),
        blocks,
        text,
        options.lbw_rules,
        named,
    )


def _family(adapter: Adapter) -> str:
    widths = {name: columns for name, m in adapter.modules.items() if (columns := outline(m)[1]) is not None}
    found = guess_families(adapter.modules, widths, adapter.store.metadata)
    if not found:
        raise UsageError("block weights need a known model, and this adapter's is not", path=adapter.path)
    return found[0]  # families that share all names share their blocks


def _from_file(text: str) -> str:
    """The list that a file holds, by name where it holds several; other text as it is.

    Raises
    ------
    UsageError
        If the file has no such list.
    """
    name, _, wanted = text.partition("#")
    path = Path(name)
    if text.upper() in PRESETS or "," in text or not path.is_file():
        return text
    if path.stat().st_size > _MAX_PRESET_BYTES:
        raise UsageError("is too large for a file of block weights", path=name)
    lists: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            title, colon, numbers = line.partition(":")
            lists[title.strip() if colon else ""] = (numbers if colon else title).strip()
    if not wanted and len(lists) == 1:
        return next(iter(lists.values()))
    if wanted not in lists:
        raise UsageError(f"has no list of block weights named {wanted!r}", path=name, hint=f"`--lbw {name}#NAME`: " + ", ".join(lists))  # fmt: skip
    return lists[wanted]
