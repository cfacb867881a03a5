"""``inspect --stats`` and ``--compare`` as users type them; the numbers are checked in tests/conformance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, read, run, succeed, write

MODULE = "lora_unet_down_a"


def report(*arguments: object) -> dict:
    device = ["--device", "cpu"] if {"--stats", "--compare"} & set(arguments) else []
    (found,) = json.loads(succeed("inspect", *arguments, *device, "--json").stdout)["files"]
    return found


def dense(path: Path, module: str = MODULE) -> torch.Tensor:
    t = {key.removeprefix(f"{module}."): tensor.double() for key, tensor in read(path).items()}
    up, down = t["lora_up.weight"], t["lora_down.weight"]
    return t.get("alpha", torch.tensor(float(len(down)))) / len(down) * up @ down


def test_a_lora_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(alpha=3.0))
    stats = report(path, "--stats", "--modules")["stats"]

    (module,) = stats["modules"]
    values = torch.linalg.svdvals(dense(path))[:2]
    assert module["values"] == pytest.approx(values.tolist(), rel=1e-5)
    assert stats["totals"]["fro"] == pytest.approx(float(dense(path).norm()), rel=1e-5)
    assert module["largest"] == max(
        t.abs().max().item() for k, t in read(path).items() if "lora" in k.split(".")[1]
    )
    assert (module["rank"], module["type"], module["component"]) == (2, "lora", "UNet/DiT")


def test_singular_values_come_with_the_modules_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora())
    assert "values" not in report(path, "--stats")["stats"]["modules"][0]
    assert report(path)["stats"] is None


def test_totals_are_over_all_components() -> None:
    stats = report(DATA / "loha.safetensors", "--stats")["stats"]
    assert stats["totals"]["modules"] == stats["totals"]["measured"] == len(stats["modules"]) == 354
    assert stats["totals"]["fro"] == pytest.approx(
        math.sqrt(sum(part["fro"] ** 2 for part in stats["components"].values()))
    )
    assert stats["totals"]["spectral"] == max(module["spectral"] for module in stats["modules"])


def test_blocks_have_their_strength() -> None:
    found = report(DATA / "lora.safetensors", "--stats", "--blocks")
    energy = sum(row["fro"] ** 2 for row in found["blocks"])
    assert energy == pytest.approx(found["stats"]["totals"]["fro"] ** 2)
    assert sum(row["share"] for row in found["blocks"]) == pytest.approx(1)
    assert report(DATA / "lora.safetensors", "--blocks")["blocks"][0]["fro"] is None


def test_dead_and_damaged_modules(tmp_path: Path) -> None:
    tensors = {**lora(), **lora("lora_unet_dead"), **lora("lora_unet_nan"), **lora("lora_unet_inf")}
    tensors["lora_unet_dead.lora_up.weight"].zero_()
    tensors["lora_unet_nan.lora_up.weight"][0, 0] = torch.nan
    tensors["lora_unet_inf.lora_down.weight"][0, :2] = torch.inf
    path = write(tmp_path / "a.safetensors", tensors)

    stats = report(path, "--stats")["stats"]
    modules = {module["name"]: module for module in stats["modules"]}
    assert (stats["totals"]["dead"], stats["totals"]["non_finite"]) == (1, 2)
    assert modules["lora_unet_dead"]["is_dead"]
    assert modules["lora_unet_nan"]["reason"].startswith(
        "1 of 12 values of lora_up.weight are not finite (NaN)"
    )
    assert modules["lora_unet_inf"]["reason"].startswith("2 of 10 values of lora_down.weight")
    text = succeed("inspect", path, "--stats", "--device", "cpu").stdout
    assert "lora_unet_dead" in text
    assert "not finite" in text


def test_a_base_gives_relative_strength(tmp_path: Path) -> None:
    path, base = write(tmp_path / "a.safetensors", lora()), write(tmp_path / "b.safetensors", checkpoint())
    stats = report(path, "--stats", "--base", base)["stats"]
    weight = read(base)["model.diffusion_model.down.a.weight"]
    assert stats["modules"][0]["relative"] == pytest.approx(
        float(dense(path).norm() / weight.norm()), rel=1e-5
    )
    assert stats["totals"]["relative"] == pytest.approx(stats["modules"][0]["relative"])
    assert "‖ΔW‖/‖W‖" in succeed("inspect", path, "--stats", "--base", base, "--device", "cpu").stdout


def test_a_base_without_the_layer(tmp_path: Path) -> None:
    module = {f"{MODULE}.weight": torch.ones(5), f"{MODULE}.on_input": torch.tensor(1)}
    path = write(tmp_path / "a.safetensors", module)
    base = write(tmp_path / "b.safetensors", {"model.diffusion_model.other.weight": torch.ones(2, 2)})
    assert report(path, "--stats", "--base", base)["stats"]["unmeasured"] == {"the base has no such layer": 1}
    text = succeed("inspect", path, "--stats", "--device", "cpu").stdout
    assert "depends on the base weight (`--base CHECKPOINT` gives it)" in text


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora())
    base = write(tmp_path / "b.safetensors", checkpoint(out=9))
    (reason,) = report(path, "--stats", "--base", base)["stats"]["unmeasured"]
    assert "is made for a 6x5 weight, this one is 9x5" in reason


def test_alpha_zero_is_read_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lora(alpha=0.0))
    assert report(path, "--stats")["stats"]["totals"]["fro"] == 0
    assert report(path, "--stats", "--alpha-zero", "rank")["stats"]["totals"]["fro"] > 0


@pytest.mark.parametrize(("top", "lines"), [(2, 2), (0, 5), (None, 5)])
def test_top_limits_the_table(top: int | None, lines: int, tmp_path: Path) -> None:
    tensors = {key: t for i in range(5) for key, t in lora(f"lora_unet_layer_{i}").items()}
    options = [] if top is None else ["--top", top]
    text = succeed("inspect", write(tmp_path / "a.safetensors", tensors), "--stats", *options).stdout
    table = text[text.index("strongest modules") :]
    assert sum(line.startswith("lora_unet_layer_") for line in table.splitlines()) == lines
    assert ("and 3 more" in table) == (top == 2)


def test_comparing_a_file_with_itself_and_its_negative(tmp_path: Path) -> None:
    tensors = lora()
    path = write(tmp_path / "a.safetensors", tensors)
    other = write(tmp_path / "b.safetensors", {k: -2 * t if "up" in k else t for k, t in tensors.items()})

    same, negative = (report(path, "--compare", file)["comparison"] for file in (path, other))

    assert (same["cosine"], same["norm_ratio"], same["interference"]) == pytest.approx((1, 1, 1))
    assert same["sign_conflict"] == 0
    assert (negative["cosine"], negative["norm_ratio"], negative["sign_conflict"]) == pytest.approx(
        (-1, 2, 1)
    )
    assert negative["interference"] == pytest.approx(-4 / 5)
    assert (negative["overlap_out"], negative["overlap_in"]) == pytest.approx((1, 1))


def test_layers_meet_across_names_and_algorithms(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**lora(), **lora("lora_unet_mine")})
    other = {
        "diffusion_model.down.a.diff": dense(path).float(),
        "diffusion_model.theirs.diff": torch.ones(2, 2),
    }
    found = report(path, "--compare", write(tmp_path / "b.safetensors", other))["comparison"]

    (row,) = found["layers"]
    assert (row["name"], row["other_name"]) == (MODULE, "diffusion_model.down.a")
    assert (row["type"], row["other_type"]) == ("lora", "full")
    assert row["cosine"] == pytest.approx(1)
    assert (found["only_first"], found["only_second"]) == (["lora_unet_mine"], ["diffusion_model.theirs"])


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = {**lora(), **lora("lora_unet_other"), **lora("lora_unet_dead")}
    two = {**lora(width=7), **lora("lora_unet_other"), **lora("lora_unet_dead")}
    two["lora_unet_other.lora_up.weight"][0, 0] = torch.nan
    two["lora_unet_dead.lora_up.weight"].zero_()
    path, other = write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", two)
    found = report(path, "--compare", other)["comparison"]
    reasons = {row["name"]: row["reason"] for row in found["layers"]}
    assert reasons[MODULE] == "sizes differ: 6x5 and 6x7"
    assert "not finite" in reasons["lora_unet_other"]
    assert reasons["lora_unet_dead"] == "one of them changes nothing"
    assert (found["compared"], found["cosine"]) == (1, None)
    assert sum(found["not_compared"].values()) == 2


def test_the_comparison_in_words(tmp_path: Path) -> None:
    path, other = DATA / "lora.safetensors", DATA / "loha.safetensors"
    text = succeed("inspect", path, "--compare", other, "--top", 3, "--device", "cpu").stdout
    assert re_line(text, "layers compared") == "354"
    assert "and 351 more" in text
    assert "lora, loha" in text


def re_line(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.removeprefix(start).strip()


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    path, other = (
        write(tmp_path / "a.safetensors", lora()),
        write(tmp_path / "b.safetensors", lora("lora_te_x")),
    )
    result = run("inspect", path, "--compare", other)
    assert result.exit_code == 5
    assert "changes no layer that" in result.stderr


@pytest.mark.parametrize("swapped", [False, True])
def test_a_checkpoint_is_no_adapter_to_compare(swapped: bool, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.safetensors", lora()), write(tmp_path / "b.safetensors", checkpoint())]
    first, second = reversed(files) if swapped else files
    result = run("inspect", first, "--compare", second)
    assert result.exit_code == 5
    assert "is no adapter" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cpu"], "--device"),
        (["--base", "b.safetensors"], "--base"),
        (["--top", "3"], "--top"),
        (["--headers-only"], "--check"),
        (["--fail-on", "info"], "--check"),
        (["--sort", "strength"], "--stats"),
        (["--sort", "findings"], "--check"),
        (["-o", "x.safetensors"], "--set"),
        (["--in-place"], "--set"),
        (["--force"], "--plot"),
        (["--dry-run"], "--set"),
        (["--check", "--headers-only", "--device", "cpu"], "--device"),
        (["--stats", "--device", "gpu9"], "no such device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_nothing_would_heed(options: list[str], words: str, tmp_path: Path) -> None:
    result = run("inspect", write(tmp_path / "a.safetensors", lora()), *options)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("option", ["--compare", "--plot"])
def test_one_file_only(option: str, tmp_path: Path) -> None:
    files = [write(tmp_path / name, lora()) for name in ("a.safetensors", "b.safetensors")]
    result = run("inspect", *files, option, tmp_path / "x.png")
    assert result.exit_code == 2
    assert "takes one FILE" in result.stderr
