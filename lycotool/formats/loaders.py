"""Which programs read which modules: a static table, with the versions it was checked against.

Right means read and given the change that training meant; a program that loads a module and
computes something else is listed as not taking it. Sources: the programs' code and runs of
them at these versions; diffusers, PEFT and LyCORIS are run against lycotool's files in its tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """One program.

    Parameters
    ----------
    name, version
        What it is called; the version or commit that was looked at.
    names
        Key names it reads, as :func:`lycotool.formats.keys.dialects` calls them.
    algorithms
        Registry names of the algorithms it computes rightly.
    use_conv_cp
        Those of them whose CP form it computes rightly too.
    dora_axes
        Axes of DoRA it computes rightly.
    sparse
        Whether it adds LyCORIS' sparse remainder.
    without
        Layouts it fails on, as ``algorithm (layout)``, and what happens.
    """

    name: str
    version: str
    names: frozenset[str]
    algorithms: frozenset[str]
    use_conv_cp: frozenset[str] = frozenset()
    dora_axes: frozenset[str] = frozenset()
    sparse: bool = False
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """What decides whether a module is read: how it is named, and what it is."""

    names: str
    algorithm: str
    layout: str
    use_conv_cp: bool
    dora_axis: str | None


def refusal(loader: Loader, kind: ModuleKind) -> str | None:
    """Why a program does not take a module; None if it does."""
    if kind.names not in loader.names:
        return f"does not read {kind.names} key names"
    if kind.algorithm not in loader.algorithms:
        return f"has no {kind.algorithm}"
    if (known := loader.without.get(f"{kind.algorithm} ({kind.layout})")) is not None:
        return known
    if kind.use_conv_cp and kind.algorithm not in loader.use_conv_cp:
        return f"has no CP core for {kind.algorithm}"
    if kind.dora_axis is not None and kind.dora_axis not in loader.dora_axes:
        return f"computes DoRA over the {kind.dora_axis} axis differently, or not at all"
    if kind.layout == "plain + sparse" and not loader.sparse:
        return "ignores the sparse part"
    return None


_LORA = frozenset({"lora", "dylora"})

LOADERS: tuple[Loader, ...] = (
    Loader(
        name="sd-scripts",
        version="48d368f (2026-02)",
        names=frozenset({"kohya", "kohya OFT"}),
        algorithms=_LORA | {"diag-oft"},
    ),
    Loader(
        name="LyCORIS",
        version="4.1.3",
        names=frozenset({"kohya", "LyCORIS wrapper"}),
        algorithms=_LORA | {"loha", "lokr", "full", "norm", "glora", "diag-oft", "boft", "tlora"},
        use_conv_cp=frozenset({"lora", "loha"}),
        dora_axes=frozenset({"out"}),
        without={
            "glora (old)": "reads the newer GLoRA layout only",
            "diag-oft (old)": "reads the newer OFT layout only",
        },
    ),
    Loader(
        name="ComfyUI",
        version="a125cd8 (2025-10)",
        names=frozenset(
            {"kohya", "ComfyUI", "diffusers", "OneTrainer", "LyCORIS wrapper", "XLabs", "bare paths"}
        ),
        algorithms=_LORA | {"loha", "lokr", "full", "norm", "glora", "diag-oft", "boft"},
        use_conv_cp=frozenset({"lora", "loha"}),
        dora_axes=frozenset({"in"}),
        without={"diag-oft (old)": "reads the newer OFT layout only"},
    ),
    Loader(
        name="A1111",
        version="1.10.1",
        names=frozenset({"kohya", "kohya OFT"}),
        algorithms=_LORA | {"loha", "lokr", "ia3", "full", "norm", "glora", "diag-oft", "boft"},
        use_conv_cp=frozenset({"lora", "loha", "lokr"}),
        dora_axes=frozenset({"in"}),
        without={"glora (new)": "fails on the newer GLoRA layout"},
    ),
    Loader(
        name="diffusers",
        version="0.42.1",
        names=frozenset({"kohya", "diffusers", "diffusers legacy", "XLabs"}),
        algorithms=_LORA,
        dora_axes=frozenset({"out"}),
    ),
    Loader(
        name="PEFT",
        version="0.21.2",
        names=frozenset({"PEFT"}),
        algorithms=_LORA | {"loha", "lokr"},
        dora_axes=frozenset({"out"}),
    ),
)
