"""The benchmarks: what they compute from what they measure, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.cases import CASES, Case, Command, Limit, Settings
from benchmarks.measure import MIB, ROOT, Run, environment
from benchmarks.results import markdown, outcome
from benchmarks.shapes import checkpoint, layers

from lycotool.models.layers import LayerIndex


def test_ratios_are_of_the_same_round() -> None:
    """The machine was twice as slow in the second round, which no ratio shows."""
    case = Case(
        "c",
        "title",
        [Command("cp", ["cp"], yardstick=True), Command("once", ["o"], yardstick=True, once=True), Command("ours", ["x"])],
        limits=[
            Limit("ours", "3 × cp + 2 s", {"cp": 3.0}, 2.0),
            Limit("ours", "1 MiB", plus=MIB, measure="rss"),
        ],
    )  # fmt: skip
    runs = {
        "cp": [Run(1.0, 0.1, 5, 4), Run(2.0, 0.2, 5, 4)],
        "once": [Run(8.0, 8.0, 5, 4)],
        "ours": [Run(4.0, 1.0, 2 * MIB, 4), Run(8.0, 3.0, MIB, 4)],
    }
    found = outcome(case, runs, {"alone": {"x": 1.5}}, {"right": {"worst": 1e-9}})
    ours = found.rows[-1]
    assert ours.seconds == 6.0
    assert ours.cpu == 2.0
    assert ours.ratios == {"cp": 4.0, "once": 0.5}  # of the one round that both had
    assert ours.limits == {"3 × cp + 2 s": pytest.approx((4 / 5 + 8 / 8) / 2), "1 MiB": 2.0}
    page = markdown([found])
    assert [line.count("|") for line in page.splitlines()] == [8] * len(page.splitlines())
    assert all(name in page for name in ("*cp*", "ours", "alone: x 1.5", "right: worst 1e-09"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_cases_fit_together(name: str, device: str, tmp_path: Path) -> None:
    """Limits are of rows there are, by rows there are; names are unique."""
    case = CASES[name](Settings(tmp_path, device))
    names = [command.name for command in case.commands]
    assert len(set(names)) == len(names)
    assert all({limit.row, *limit.factors} <= set(names) for limit in case.limits)
    assert case.name == name
    assert case.commands or case.absent


@pytest.mark.parametrize(
    ("model", "modules", "tensors", "nbytes"), [("sd15", 354, 1130, 2.13), ("sdxl", 794, 2514, 6.94)]
)
def test_shapes_are_a_model(model: str, modules: int, tensors: int, nbytes: float) -> None:
    """Every module has a layer of its own in the checkpoint."""
    shapes, found = checkpoint(model), layers(model)
    assert (len(found), len(shapes)) == (modules, tensors)
    numbers = 0
    for shape in shapes.values():
        count = 1
        for size in shape:
            count *= size
        numbers += count
    assert numbers * 2 / 1e9 == pytest.approx(nbytes, abs=0.005)
    index = LayerIndex(shapes)
    places = set()
    for path, shape in found.items():
        layer = index.find(path.replace(".", "_"))
        assert layer is not None, path
        assert layer.weight.shape == shape
        places.add((layer.weight.key, layer.weight.rows))
    assert len(places) == modules


def test_a_quick_run(tmp_path: Path) -> None:
    """The whole program, with the cases that need the least."""
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "--only", "start", "convert",
               "--json", tmp_path / "x.json", "--markdown", tmp_path / "x.md", "--folder", tmp_path]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["machine"]["quick"]
    rows = {row["name"]: row for case in document["cases"] for row in case["rows"]}
    assert {"import torch", "cp", "convert", "inspect FILE", "TAB", "--help"} <= rows.keys()
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["rounds"] == 1
        if not row["yardstick"]:
            assert row["ratios"]
        for name, ratio in row["ratios"].items():
            assert ratio == pytest.approx(row["seconds"] / rows[name]["seconds"])
    # A child's memory is its own, not what it was started from.
    assert rows["cp"]["rss"] < 64 * MIB < rows["import torch"]["rss"]
    assert "| convert |" in (tmp_path / "x.md").read_text()
    assert "start-up" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]
