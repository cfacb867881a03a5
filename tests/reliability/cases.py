"""What a case of the table is, and how each verb is given its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reliability.lab import DEFAULT, Setting

#: Makes a case's input in a folder and gives the name to type for it.
Maker = Callable[[Path], str]

OUT = "out.safetensors"

#: How each verb is given the input, which stands for ``{x}``. ``base`` is `bake` with the input
#: as the checkpoint, ``fold`` is `merge` into one, ``subtract`` is `extract` of two sound ones.
VERBS: Mapping[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{x}", "--modules", "--metadata"),
    "json": ("inspect", "{x}", "--modules", "--metadata", "--json"),
    "check": ("inspect", "{x}", "--check"),
    "edit": ("inspect", "{x}", "--set", "note=x", "-o", OUT),
    "resize": ("resize", "{x}", "--rank", "2", "-o", OUT),
    "merge": ("merge", "good.safetensors", "{x}", "-o", OUT),
    "fold": ("merge", "base.safetensors", "{x}", "-o", OUT),
    "bake": ("bake", "base.safetensors", "{x}", "-o", OUT),
    "base": ("bake", "{x}", "good.safetensors", "-o", OUT),
    "convert": ("convert", "{x}", "--to", "diffusers", "--arch", "sd1", "-o", OUT),
    "extract": ("extract", "base.safetensors", "{x}", "--rank", "2", "-o", OUT),
    "subtract": ("extract", "base.safetensors", "tuned.safetensors", "--rank", "2", "-o", OUT),
}

#: What each verb that writes makes its output from, in the order of its command line.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "edit": ("{x}",),
    "resize": ("{x}",),
    "merge": ("good.safetensors", "{x}"),
    "fold": ("base.safetensors", "{x}"),
    "bake": ("base.safetensors", "{x}"),
    "base": ("{x}", "good.safetensors"),
    "convert": ("{x}",),
    "extract": ("base.safetensors", "{x}"),
    "subtract": ("base.safetensors", "tuned.safetensors"),
}

#: Verbs an adapter is for, verbs a checkpoint is for, and all that read a container.
ADAPTER = ("inspect", "check", "resize", "merge", "bake", "convert")
WRITING = ("edit", "resize", "merge", "fold", "bake", "convert", "subtract")
CHECKPOINT = ("inspect", "check", "base", "extract")
CONTAINER = (
    "inspect",
    "json",
    "check",
    "edit",
    "resize",
    "merge",
    "fold",
    "bake",
    "base",
    "convert",
    "extract",
)


@dataclass(frozen=True, slots=True)
class Expected:
    """Exit codes that are right, and what standard error must say (a pattern, case ignored)."""

    codes: tuple[int, ...]
    message: str = ""

    @classmethod
    def of(cls, code: int, message: str = "") -> Expected:
        """One code."""
        return cls((code,), message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    make
        Makes the input beside ``good.safetensors`` (an adapter) and ``base.safetensors`` (a
        checkpoint it fits).
    expected
        For every verb, unless ``by_verb`` has its own.
    options
        Further arguments, for every verb.
    output
        What a run that succeeds writes.
    is_counted
        Whether the tensors of what it is given can be told apart by their names alone.
    after
        Looks at the folder of a run that succeeded.
    seconds
        What a run may take of the processor.
    decision
        Where the study the table comes from expected something else: what holds, and why.
    """

    id: str
    what: str
    make: Maker
    expected: Expected
    verbs: tuple[str, ...]
    by_verb: Mapping[str, Expected] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    setting: Setting = DEFAULT
    output: str = OUT
    is_counted: bool = True
    after: Callable[[Path], None] | None = None
    seconds: float = 60.0
    decision: str = ""

    def runs(self) -> list[tuple[str, Expected]]:
        """The verbs and what each must do."""
        return [(verb, self.by_verb.get(verb, self.expected)) for verb in self.verbs]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A row another test is for: ``file::name`` below ``tests``."""

    id: str
    what: str
    test: str


@dataclass(frozen=True, slots=True)
class Untried:
    """A row that is not run, and why."""

    id: str
    what: str
    reason: str


Row = Case | Elsewhere | Untried
