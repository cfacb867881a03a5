"""The table of dialects: complete, consistent, and read back as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from makers.adapters import MANNERS, UNETS, key_of, layers

from lycotool.algorithms import ALGORITHMS, SLOT_NAMES
from lycotool.cli import convert as command
from lycotool.formats.dialects import DIALECTS, Dialect
from lycotool.formats.keys import dialects, parse_keys
from lycotool.models.families import FAMILIES

BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def test_the_command_line_offers_every_dialect_and_family() -> None:
    assert get_args(command.FORMATS) == tuple(DIALECTS)
    assert get_args(command.FAMILIES) == tuple(FAMILIES)


def test_the_table_is_by_name() -> None:
    assert {name: dialect.name for name, dialect in DIALECTS.items()} == {name: name for name in DIALECTS}
    assert DIALECTS.keys() == MANNERS.keys()


@every_dialect
def test_it_speaks_of_what_there_is(dialect: Dialect) -> None:
    assert dialect.algorithms <= BY_NAME.keys()
    assert dialect.families is None or dialect.families <= FAMILIES.keys()
    assert dialect.suffixes.keys() <= SLOT_NAMES
    assert dialect.unread <= SLOT_NAMES
    assert dialect.dora_axes <= {"in", "out"}
    assert dialect.bias_slot in (None, "diff_b", "lora_up.bias")
    if dialect.use_conv_cp:
        assert any(layout.use_conv_cp for name in dialect.algorithms for layout in BY_NAME[name].layouts)
    # Without dots a name and its prefix are one word, and all dots are the suffix's.
    assert dialect.dotted or "." not in f"{dialect.denoiser}{dialect.transformer or ''}{dialect.infix}"
    assert dialect.is_folder == (dialect.alpha == "config")


@every_dialect
def test_two_slots_are_never_spelled_alike(dialect: Dialect) -> None:
    for name in dialect.algorithms:
        for layout in BY_NAME[name].layouts:
            spelled = [dialect.suffixes.get(slot, slot) for slot in sorted(layout.names)]
            assert len(set(spelled)) == len(spelled)


def written_slots(dialect: Dialect) -> Iterator[frozenset[str]]:
    """The slots of every layout that a dialect writes, its own name for the magnitude among them."""
    for name in sorted(dialect.algorithms):
        for layout in BY_NAME[name].layouts:
            slots = {slot.name for slot in layout.slots if not slot.unused} - dialect.unread
            if layout.required - dialect.unread < layout.required:
                continue
            if dialect.alpha in ("folded", "config") and "lora_up.weight" in slots:
                slots -= {"alpha"}
            slots -= {"diff_b", "lora_up.bias"} - {dialect.bias_slot} if "lora_up.weight" in slots else set()
            dora = {dialect.dora_slot} if dialect.dora_axes and "lora_up.weight" in slots else set()
            yield frozenset(slots | dora)


#: What the field calls the files of a dialect.
CALLED = {
    "networks.lora": "kohya",
    "lycoris.kohya": "kohya",
    "locon.locon_kohya": "kohya",
    "lycoris": "LyCORIS wrapper",
    "diffusers": "diffusers",
    "diffusers-legacy": "diffusers legacy",
    "peft": "PEFT",
    "comfyui": "ComfyUI",
    "ai-toolkit": "diffusers",
    "bfl": "bare paths",
    "hcp": "HCP-Diffusion",
    "kohya-oft": "kohya OFT",
}


@pytest.mark.parametrize("family", FAMILIES)
@every_dialect
def test_what_is_written_is_read_back(dialect: Dialect, family: str) -> None:
    """Every key of every module, in every layout: the same module, the same slot."""
    if dialect.families is not None and family not in dialect.families:
        return
    names = [name for layer in layers(family) for name, _ in layer.modules(dialect.name)]
    assert names
    for slots in written_slots(dialect):
        keys = {key_of(dialect.name, name, slot): (name, slot) for name in names for slot in slots}
        found = parse_keys(keys, SLOT_NAMES)
        assert [*found.unknown, *found.orphans, *found.clashes, *found.embeddings] == []
        read = {key: (name, slot) for name, m in found.modules.items() for slot, key in m.slots.items()}
        # ai-toolkit's word for LyCORIS' magnitude
        assert read == {k: (n, "dora_scale" if s == "magnitude" else s) for k, (n, s) in keys.items()}
        expected = CALLED.get(dialect.name, "kohya" if family in UNETS else "OneTrainer")
        if "lora_up.weight" in slots or dialect.name not in ("hcp", "diffusers-legacy"):
            assert dialects(found) == [expected]


@pytest.mark.parametrize(
    ("processor", "module"),
    [
        ("double_blocks.3.processor.qkv_lora1", "double_blocks.3.img_attn.qkv"),
        ("double_blocks.3.processor.qkv_lora2", "double_blocks.3.txt_attn.qkv"),
        ("double_blocks.3.processor.proj_lora1", "double_blocks.3.img_attn.proj"),
        ("double_blocks.3.processor.proj_lora2", "double_blocks.3.txt_attn.proj"),
        ("single_blocks.12.processor.qkv_lora", "single_blocks.12.linear1_qkv"),
        ("single_blocks.12.processor.proj_lora", "single_blocks.12.linear2"),
    ],
)
def test_xlabs_keys(processor: str, module: str) -> None:
    keys = {f"{processor}.{side}.weight": f"lora_{side}.weight" for side in ("up", "down")}
    found = parse_keys(keys, SLOT_NAMES)
    assert {name: dict(m.slots) for name, m in found.modules.items()} == {
        module: {slot: key for key, slot in keys.items()}
    }
    assert dialects(found) == ["XLabs"]


@pytest.mark.parametrize("inner", ["layer.W_", "layer.lora_"])
def test_hcp_keys(inner: str) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = ".weight" if "lora" in inner else ""
    keys = {f"{path}.___.{inner}{side}{weight}": f"lora_{side}.weight" for side in ("up", "down")}
    keys[f"{path}.___.alpha"] = "alpha"
    found = parse_keys(keys, SLOT_NAMES)
    assert {name: dict(m.slots) for name, m in found.modules.items()} == {
        path: {slot: key for key, slot in keys.items()}
    }
    assert found.spelling == "hcp"
    assert dialects(found) == ["HCP-Diffusion"]
