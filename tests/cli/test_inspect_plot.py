"""``inspect --plot``: pictures, and bars where there are none."""

from __future__ import annotations

import importlib.util
import re
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from helpers import DATA, lora, run, succeed, write

LORA, LOHA = DATA / "lora.safetensors", DATA / "loha.safetensors"


def test_a_png_for_people(tmp_path: Path) -> None:
    result = succeed("inspect", LORA, "--plot", tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1600, 1120)
    assert f"wrote {tmp_path / 'a.png'}" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def texts(path: Path) -> set[str]:
    return {
        "".join(e.itertext()).strip()
        for e in ET.fromstring(path.read_text()).iter("{http://www.w3.org/2000/svg}text")
    }


def test_an_svg_names_blocks_layers_and_axes(tmp_path: Path) -> None:
    succeed("inspect", LORA, "--plot", tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    assert {"BASE", "IN00", "OUT11", "outside", "attn1_to_q", "median", "k", "TE1", "UNet/DiT"} <= found
    assert "‖ΔW‖ of the block" in found
    assert any(text.startswith("lora.safetensors: SD 1.x, 354 modules") for text in found)


def test_a_comparison_has_its_own_picture(tmp_path: Path) -> None:
    succeed("inspect", LORA, "--compare", LOHA, "--plot", tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    assert {"M00", "attn2_to_k", "cosine", "overlap of outputs", "‖ΔB‖ of a layer", "equal"} <= found
    assert any("loha.safetensors (B): 354 layers" in text for text in found)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_picture_twice(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora())
    for name in ("x", "y"):
        succeed("inspect", path, "--plot", tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"y.{ending}").read_bytes()


ODD = {
    "one module": lora("lora_unet_$x^$"),
    "unknown model": {"strange.module.diff": torch.randn(4, 5)},
    "nothing but zeros": {k: t * 0 for k, t in lora().items()},
    "norms only": {"lora_unet_n.w_norm": torch.ones(4)},
    "not measured": {"lora_unet_x.weight": torch.ones(3), "lora_unet_x.on_input": torch.tensor(1)},
    "many values": {"lora_unet_x.diff": torch.randn(100, 120)},
}


@pytest.mark.parametrize("what", ODD)
def test_odd_files_can_be_drawn(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", ODD[what])
    for options in ([], ["--compare", path]):
        succeed("inspect", path, *options, "--plot", tmp_path / "a.svg", "--force")
        assert texts(tmp_path / "a.svg")
        succeed("inspect", path, *options, "--plot", "-")


def test_bars_in_the_terminal() -> None:
    text = succeed("inspect", LORA, "--plot", "-").stdout
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars["BASE"] == 40  # the strongest block
    assert 0 < bars["IN01"] < bars["M00"] < 40
    assert re.search(r"^1 +1 +█{40}", text, flags=re.MULTILINE)  # σ_1 / σ_1


def test_bars_and_json_do_not_go_together() -> None:
    result = run("inspect", LORA, "--plot", "-", "--json")
    assert result.exit_code == 2
    assert "standard output" in result.stderr


def test_bars_of_a_comparison() -> None:
    text = succeed("inspect", LORA, "--compare", LORA, "--plot", "-").stdout
    assert re.search(r"^\+0\.8 to \+1\.0 +354 +█{40}", text, flags=re.MULTILINE)


def test_without_matplotlib_there_are_bars_and_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    result = run("inspect", LORA, "--plot", tmp_path / "a.png")
    assert result.exit_code == 7
    assert "█" in result.stdout
    assert "pip install 'lycotool[plot]'" in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_a_picture_is_replaced_with_force_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    assert run("inspect", LORA, "--plot", tmp_path / "a.png").exit_code == 7
    assert (tmp_path / "a.png").read_bytes() == b"old"
    succeed("inspect", LORA, "--plot", tmp_path / "a.png", "--force")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "code"), [("a.pdf", 2), ("plot", 2), ("no/such/folder/a.png", 7)])
def test_names_that_cannot_be_drawn_to(name: str, code: int, tmp_path: Path) -> None:
    assert run("inspect", LORA, "--plot", tmp_path / name).exit_code == code


def test_a_checkpoint_has_nothing_to_draw(tmp_path: Path) -> None:
    result = run("inspect", DATA / "base.safetensors", "--plot", tmp_path / "a.png")
    assert result.exit_code == 5
    assert "no adapter" in result.stderr
