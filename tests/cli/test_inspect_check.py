"""``inspect --check``: every finding has a file that it is found in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, run, succeed, write

from lycotool.ops._findings import CHECKS

Tensors = dict[str, torch.Tensor]
MODULE = "lora_unet_down_a"


def findings(path: Path, *options: object, code: int = 10) -> dict[str, dict]:
    """Findings by id, of a file whose check ends with this code."""
    result = run("inspect", path, "--check", "--json", *options)
    assert result.exit_code == code, result.output
    (file,) = json.loads(result.stdout)["files"]
    return {finding["id"]: finding for finding in file["findings"]}


def changed(change: Callable[[Tensors], object], **options: object) -> Tensors:
    tensors = lora(**options)
    change(tensors)
    return tensors


def without_down() -> Tensors:
    return {**lora(), f"{MODULE}2.lora_up.weight": torch.ones(2, 1)}


def spoilt(value: float) -> Tensors:
    return changed(lambda tensors: tensors[f"{MODULE}.lora_up.weight"].view(-1)[:2].fill_(value))


def dora() -> Tensors:
    return {**lora(), f"{MODULE}.dora_scale": torch.ones(6, 1)}


def flat() -> Tensors:
    """A rank of 4 that does the work of 1."""
    tensors = lora(rank=4)
    tensors[f"{MODULE}.lora_up.weight"][:, 1:] *= 1e-3
    return tensors


GOOD = lora(out=16, width=16)
CASES: dict[str, tuple[Tensors, dict[str, str] | None]] = {
    "damaged-module": (without_down(), None),
    "alpha-not-finite": (lora(alpha=float("nan")), None),
    "orphan-alpha": ({**lora(), "lora_unet_ghost.alpha": torch.tensor(1.0)}, None),
    "duplicate-layer": ({**lora(), **{k.replace("lora_unet_down_a", "unet.down.a"): t for k, t in lora().items()}}, None),
    "unknown-tensor": ({**lora(), "mystery": torch.ones(1)}, None),
    "alpha-missing": (lora(alpha=None), None),
    "alpha-zero": (lora(alpha=0.0), None),
    "alpha-negative": (lora(alpha=-1.0), None),
    "alpha-above-rank": (lora(alpha=3.0), None),
    "rs-lora-not-folded": (lora(), {"ss_network_args": '{"rs_lora": "True"}', "ss_network_alpha": "1.0"}),
    "rank-above-size": (lora(rank=7), None),
    "dora-axis": (dora(), None),
    "mixed-spellings": ({**lora(), "diffusion_model.b.lora_A.weight": torch.randn(1, 3),
                         "diffusion_model.b.lora_B.weight": torch.randn(3, 1)}, None),
    "no-loader": ({"base_model.model.x.weight": torch.ones(3), "base_model.model.x.on_input": torch.tensor(1)}, None),
    "metadata-conflict": (lora(), {"ss_network_dim": "8"}),
    "metadata-not-json": (lora(), {"ss_network_args": "{broken"}),
    "private-path": (lora(), {"ss_sd_model_name": "C:\\Users\\me\\model.ckpt"}),
    "training-data": (lora(), {"ss_tag_frequency": '{"me": {"1girl": 3}}'}),
    "stale-hash": (lora(), {"sshs_model_hash": "0" * 64}),
    "hash-of-nothing": (lora(), {"sshs_model_hash": hashlib.sha256().hexdigest()}),
    "non-finite": (spoilt(float("inf")), None),
    "fp16-overflow": (spoilt(1e5), None),
    "fits-fp16": ({k: t.half().float() for k, t in GOOD.items()}, None),
    "dead-module": ({**lora(), **changed(lambda t: t["lora_unet_x.lora_up.weight"].zero_(), module="lora_unet_x")}, None),
    "wasted-rank": (flat(), None),
    "needs-base": (dora(), None),
}  # fmt: skip


@pytest.mark.parametrize("id", CASES)
def test_every_finding(id: str, tmp_path: Path) -> None:
    tensors, metadata = CASES[id]
    reads, severity, _ = CHECKS[id]
    path = write(tmp_path / "a.safetensors", tensors, metadata)

    result = run("inspect", path, "--check", "--fail-on", "info", "--json")
    (file,) = json.loads(result.stdout)["files"]
    found = {finding["id"]: finding for finding in file["findings"]}
    assert result.exit_code == 10
    assert found[id]["severity"] == severity
    assert found[id]["text"]

    only_headers = run("inspect", path, "--check", "--headers-only", "--json")
    (file,) = json.loads(only_headers.stdout)["files"]
    assert (id in {finding["id"] for finding in file["findings"]}) == (reads == "header")

    text = run("inspect", path, "--check", "--fail-on", severity)
    assert id in text.stdout
    assert text.exit_code == 10
    assert "found " in text.stderr


def test_every_check_has_a_case() -> None:
    assert CASES.keys() | {"pickle"} == CHECKS.keys()


def test_the_hash_of_the_model_specification(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", GOOD, {"modelspec.hash_sha256": "0x" + "1" * 64})
    assert findings(path)["stale-hash"]["modules"] == ["modelspec.hash_sha256"]
    content = path.read_bytes()
    right = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert findings(write(path, GOOD, {"modelspec.hash_sha256": f"0x{right}"}), code=0) == {}


def test_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(lora(), path)
    assert "pickle" in findings(path, "--allow-pickle")


def test_a_sound_file_passes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", GOOD, {"ss_network_dim": "2", "ss_network_alpha": "1"})
    assert findings(path, code=0) == {}
    assert "nothing found" in succeed("inspect", path, "--check").stdout


def test_the_samples_pass() -> None:
    for name in ("lora.safetensors", "loha.safetensors"):
        assert set(findings(DATA / name, code=0)) <= {"training-data", "fits-fp16", "wasted-rank"}


@pytest.mark.parametrize(("level", "code"), [("error", 0), ("warning", 0), ("info", 10), (None, 0)], ids=str)
def test_the_least_finding_that_counts(level: str | None, code: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**GOOD, f"{MODULE}.alpha": torch.tensor(4.0)})
    options = [] if level is None else ["--fail-on", level]
    assert "alpha-above-rank" in findings(path, *options, code=code)


def test_a_folded_rs_lora_is_no_conflict(tmp_path: Path) -> None:
    metadata = {"ss_network_args": '{"rs_lora": "True"}', "ss_network_alpha": "1.0", "ss_network_dim": "2"}
    path = write(tmp_path / "a.safetensors", {**GOOD, f"{MODULE}.alpha": torch.tensor(2**0.5)}, metadata)
    assert findings(path, code=0) == {}


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("/home/me/pictures/cat", True),
        ('{"/mnt/d/set": {"img_count": 3}}', True),
        (r"D:\train\img", True),
        (r'["E:\\data"]', True),
        (r"\\nas\share", True),
        ("https://example.org/home/page", False),
        ("masterpiece, best quality", False),
        ("1/2 and either/or", False),
        ("{'a': 'b:/'}", False),
    ],
)
def test_paths_are_told_from_other_text(text: str, leaks: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", GOOD, {"note": text})
    assert ("private-path" in findings(path, code=10 if leaks else 0)) == leaks


def test_a_checkpoint_is_checked_for_values(tmp_path: Path) -> None:
    tensors = checkpoint()
    tensors["first_stage_model.untouched.weight"][1] = torch.nan
    found = findings(write(tmp_path / "a.safetensors", tensors))
    assert found["non-finite"]["modules"] == ["first_stage_model.untouched.weight"]


def test_a_base_lets_everything_be_measured(tmp_path: Path) -> None:
    path, base = write(tmp_path / "a.safetensors", dora()), write(tmp_path / "b.safetensors", checkpoint())
    assert "needs-base" not in findings(path, "--base", base)


def test_several_files_are_counted_in_the_table(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", GOOD)
    write(tmp_path / "b.safetensors", lora(alpha=0.0))
    result = run("inspect", tmp_path, "--check", "--sort", "findings", "--reverse")
    assert result.exit_code == 10
    lines = result.stdout.splitlines()
    assert lines[0].split()[-1] == "findings"
    assert "b.safetensors" in lines[1]
    assert "warning" in lines[1]
    assert lines[2].split()[-1] == "none"


def test_a_damaged_file_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"short")
    assert run("inspect", tmp_path / "a.safetensors", "--check").exit_code == 3
