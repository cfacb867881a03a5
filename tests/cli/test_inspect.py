"""``lycotool inspect`` as users type it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import DATA, GOLDEN, checkpoint, lora, read, run, succeed, write

MODULE = "lora_unet_down_a"


def report(*arguments: object) -> dict[str, object]:
    return json.loads(succeed("inspect", *arguments, "--json").stdout)["files"][0]


def test_sample_loha() -> None:
    found = report(DATA / "loha.safetensors")
    assert found["kind"] == "adapter"
    assert found["architecture"] == "SD 1.x"
    assert found["dialects"] == ["kohya"]
    assert found["components"] == {"UNet/DiT": 282, "TE1": 72}
    (row,) = found["algorithms"]
    assert (row["type"], row["modules"], row["rank"], row["alpha"]) == ("loha", 354, {"2": 354}, {"1": 354})
    assert row["mergeable"]
    assert not row["resizable"]
    assert row["exact_as_lora"]
    assert found["metadata"]["ss_network_args"]["algo"] == "loha"
    assert found["faults"] == found["warnings"] == []


def test_sample_checkpoint() -> None:
    found = report(DATA / "base.safetensors")
    assert found["kind"] == "checkpoint"
    assert found["architecture"] == "SD 1.x"
    assert found["tensors"] == 1145
    assert found["parameters"] == sum(t.numel() for t in read(DATA / "base.safetensors").values())


def test_human_report_names_everything() -> None:
    text = succeed("inspect", DATA / "loha.safetensors").stdout
    for expected in ("module type table", "loha", "SD 1.x", "kohya", "use_conv_cp", "sshs_model_hash"):
        assert expected in text
    assert "\x1b" not in text


def test_every_module() -> None:
    result = succeed("inspect", DATA / "loha.safetensors", "--modules")
    assert len(re.findall(r"^lora_(?:unet|te)_\S+ +loha", result.stdout, flags=re.MULTILINE)) == 354
    modules = json.loads(succeed("inspect", DATA / "loha.safetensors", "--modules", "--json").stdout)
    assert len(modules["files"][0]["modules"]) == 354


def test_all_metadata_is_decoded(tmp_path: Path) -> None:
    said = {"ss_tag_frequency": json.dumps({"10_x": {"cat": 3}}), "zzz_private": "kept"}
    file = write(tmp_path / "a.safetensors", lora(), said)
    assert "zzz_private" not in succeed("inspect", file).stdout
    text = succeed("inspect", file, "--metadata").stdout
    assert "zzz_private" in text
    assert '{"10_x": {"cat": 3}}' in text


GOLDEN_TYPES = {
    "lora_linear": "lora", "locon_conv3x3_cp": "lora (cp)", "loha_conv3x3": "loha",
    "loha_conv3x3_cp": "loha (cp)", "lokr_conv3x3_tucker": "lokr (cp)", "lokr_both_full": "lokr",
    "ia3_linear_in": "ia3", "full_linear_diff_b": "full", "norm_layernorm": "norm",
    "glora_linear": "glora", "glora_old_linear": "glora", "oft_linear": "diag-oft",
    "oft_diag_old_linear": "diag-oft", "boft_linear": "boft", "sparse_bias_linear": "lora",
    "dora_linear_out": "lora + dora (out)", "dora_conv3x3_in": "lora + dora (in)",
    "loha_dora_linear_out": "loha + dora (out)", "kohya_oft_linear": "diag-oft",
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN_TYPES)
def test_type_of_golden_adapter(case: str, tmp_path: Path) -> None:
    tensors = read(GOLDEN / f"{case}.safetensors")
    adapter = {k.removeprefix("adapter."): t for k, t in tensors.items() if k.startswith("adapter.")}
    found = report(write(tmp_path / "a.safetensors", adapter))
    assert [row["type"] for row in found["algorithms"]] == [GOLDEN_TYPES[case]]


@pytest.mark.parametrize(
    "said", [{"ss_network_module": "networks.dylora"}, {"ss_network_args": '{"algo": "dylora"}'}], ids=str
)
def test_dylora_is_known_by_its_metadata(said: dict[str, str], tmp_path: Path) -> None:
    found = report(write(tmp_path / "a.safetensors", lora(), said))
    assert [row["type"] for row in found["algorithms"]] == ["dylora"]


def test_mixed_algorithms(tmp_path: Path) -> None:
    tensors = {**lora(), "lora_unet_norm.w_norm": torch.ones(4), "lora_unet_k.lokr_w1": torch.ones(2, 2),
               "lora_unet_k.lokr_w2": torch.ones(2, 2)}  # fmt: skip
    rows = report(write(tmp_path / "a.safetensors", tensors))["algorithms"]
    assert {row["type"]: row["mergeable"] for row in rows} == {"lora": True, "norm": True, "lokr": False}


def test_faults_are_shown_and_the_exit_code_is_0(tmp_path: Path) -> None:
    broken = {key: t for key, t in lora("lora_unet_broken").items() if "down" not in key}
    result = succeed("inspect", write(tmp_path / "a.safetensors", {**lora(), **broken}))
    assert "lora_unet_broken: lora_down.weight missing" in result.stderr
    found = report(tmp_path / "a.safetensors")
    assert len(found["faults"]) == 1
    assert found["algorithms"][0]["modules"] == 1


def test_things_left_aside_are_named(tmp_path: Path) -> None:
    tensors = {**lora(), "mystery.tensor": torch.ones(1), "ghost.alpha": torch.ones(())}
    result = succeed("inspect", write(tmp_path / "a.safetensors", tensors))
    assert "mystery.tensor" in result.stderr
    assert "ghost.alpha" in result.stderr


def test_several_files_give_a_line_each(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", lora())
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "b.safetensors", checkpoint())
    lines = succeed("inspect", tmp_path).stdout.splitlines()
    assert len(lines) == 3
    assert "lora 1" in lines[1]
    assert "checkpoint" in lines[2]


def test_one_bad_file_among_several(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", lora())
    (tmp_path / "b.safetensors").write_bytes(b"")
    result = run("inspect", tmp_path)
    assert result.exit_code == 3
    assert "a.safetensors" in result.stdout
    assert "empty file" in result.stderr


def test_text_from_files_is_neutralised(tmp_path: Path) -> None:
    evil = "\x1b[31m[/bold][link=file:///etc]x[/link]\u202e\n[error] all fine"
    module = "lora_unet_\x1b[2J\nfake"
    file = write(tmp_path / "a.safetensors", lora(module), {"ss_output_name": evil})
    result = succeed("inspect", file, "--modules", "--metadata")
    for stream in (result.stdout, result.stderr):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", stream)
    assert "[/bold][link=file:///etc]" in result.stdout
    assert not any(line.startswith("[error]") for line in result.stdout.splitlines())
    assert report(file)["metadata"]["ss_output_name"] == evil


@pytest.mark.parametrize("name", ["SDXL", "SD 2.x", "SD 1.x"])
def test_architecture_by_context_width(name: str, tmp_path: Path) -> None:
    width = {"SD 1.x": 768, "SD 2.x": 1024, "SDXL": 2048}[name]
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert report(write(tmp_path / "a.safetensors", lora(module, width=width)))["architecture"] == name


def test_empty_file(tmp_path: Path) -> None:
    assert report(write(tmp_path / "a.safetensors", {}))["kind"] == "empty"
