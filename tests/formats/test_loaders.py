"""The table of loaders: it names what exists, and says no for the reasons it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lycotool.algorithms import ALGORITHMS
from lycotool.formats.loaders import LOADERS, Loader, ModuleKind, refusal

BY_NAME = {loader.name: loader for loader in LOADERS}
LORA = ModuleKind("kohya", "lora", "plain", False, None)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_it_names_what_the_registry_has(loader: Loader) -> None:
    known = {algorithm.name: {layout.name for layout in algorithm.layouts} for algorithm in ALGORITHMS}

    assert loader.version
    assert loader.algorithms <= known.keys()
    assert loader.use_conv_cp <= loader.algorithms
    for entry in loader.without:
        algorithm, _, layout = entry.removesuffix(")").partition(" (")
        assert layout in known[algorithm]


@pytest.mark.parametrize(
    ("loader", "kind", "reason"),
    [
        ("LyCORIS", LORA, None),
        ("PEFT", LORA, "does not read kohya key names"),
        ("PEFT", replace(LORA, names="PEFT"), None),
        ("diffusers", replace(LORA, algorithm="loha"), "has no loha"),
        ("sd-scripts", replace(LORA, layout="cp", use_conv_cp=True), "has no CP core for lora"),
        ("LyCORIS", replace(LORA, layout="cp", use_conv_cp=True), None),
        ("diffusers", replace(LORA, dora_axis="in"), "computes DoRA over the in axis differently, or not at all"),
        ("diffusers", replace(LORA, dora_axis="out"), None),
        ("ComfyUI", replace(LORA, layout="plain + sparse"), "ignores the sparse part"),
        ("A1111", replace(LORA, algorithm="glora", layout="new"), "fails on the newer GLoRA layout"),
    ],
)  # fmt: skip
def test_refusal(loader: str, kind: ModuleKind, reason: str | None) -> None:
    assert refusal(BY_NAME[loader], kind) == reason
