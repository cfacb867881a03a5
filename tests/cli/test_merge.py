"""``lycotool merge`` as users type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, read, run, succeed, write
from safetensors import safe_open


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def delta(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
    return float(tensors[f"{module}.alpha"]) / down.shape[0] * (up.double() @ down.double())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_main_job_on_the_sample_files(in_folder: Path) -> None:
    result = succeed("merge", DATA / "base.safetensors", DATA / "loha.safetensors")
    assert result.stdout == "base+loha.safetensors\n"
    before, after = read(DATA / "base.safetensors"), read(in_folder / "base+loha.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 354
    assert all(key.startswith(("model.diffusion_model.", "cond_stage_model.")) for key in changed)
    assert all(before[key].dtype == after[key].dtype for key in before)


def test_same_inputs_same_bytes(in_folder: Path) -> None:
    for name in ("one", "two"):
        succeed("merge", DATA / "base.safetensors", DATA / "lora.safetensors", "-o", f"{name}.safetensors")
    assert (in_folder / "one.safetensors").read_bytes() == (in_folder / "two.safetensors").read_bytes()


def test_adapters_give_the_weighted_sum(in_folder: Path) -> None:
    module = "lora_unet_down_a"
    a, b = lora(module, rank=2, alpha=1.0), lora(module, rank=3, alpha=-6.0)
    write(in_folder / "a.safetensors", a)
    write(in_folder / "b.safetensors", b)
    result = succeed("merge", "a.safetensors:0.5", "b.safetensors:-1.25")
    assert result.stdout == "a+b.safetensors\n"
    merged = read(in_folder / "a+b.safetensors")
    expected = 0.5 * delta(a, module) - 1.25 * delta(b, module)
    # Folding the coefficients rounds `up` once in float32.
    assert (delta(merged, module) - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * 30
    assert merged[f"{module}.lora_down.weight"].shape[0] == 5


def test_module_of_one_adapter_keeps_its_algorithm(in_folder: Path) -> None:
    loha = {f"lora_unet_only.hada_w{i}_{s}": torch.randn(*shape) for i in (1, 2)
            for s, shape in (("a", (6, 2)), ("b", (2, 5)))}  # fmt: skip
    write(in_folder / "a.safetensors", loha | {"lora_unet_only.alpha": torch.tensor(2.0)})
    write(in_folder / "b.safetensors", lora())
    succeed("merge", "a.safetensors:0.5", "b.safetensors", "-o", "ab.safetensors")
    merged = read(in_folder / "ab.safetensors")
    assert torch.equal(merged["lora_unet_only.hada_w1_a"], 0.5 * loha["lora_unet_only.hada_w1_a"])
    for slot in ("hada_w1_b", "hada_w2_a", "hada_w2_b"):
        assert torch.equal(merged[f"lora_unet_only.{slot}"], loha[f"lora_unet_only.{slot}"])


def test_names_of_another_dialect_meet(in_folder: Path) -> None:
    kohya, peft = lora("lora_unet_down_a"), lora("x", alpha=None)
    write(in_folder / "a.safetensors", kohya)
    renamed = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
    write(in_folder / "b.safetensors", {f"unet.down.a.{renamed[k[2:]]}": t for k, t in peft.items()})
    succeed("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")
    merged = read(in_folder / "ab.safetensors")
    assert {key.split(".")[0] for key in merged} == {"lora_unet_down_a"}
    expected = delta(kohya, "lora_unet_down_a") + delta({**peft, "x.alpha": torch.tensor(2.0)}, "x")
    assert torch.allclose(delta(merged, "lora_unet_down_a"), expected, atol=1e-5)


def test_dotted_dialect_is_kept(in_folder: Path) -> None:
    for name in ("a", "b"):
        factors = {
            "unet.down.a.lora_A.weight": torch.randn(2, 5),
            "unet.down.a.lora_B.weight": torch.randn(6, 2),
        }
        write(in_folder / f"{name}.safetensors", factors)
    succeed("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")
    merged = read(in_folder / "ab.safetensors")
    assert set(merged) == {"unet.down.a.lora_A.weight", "unet.down.a.lora_B.weight"}


def test_metadata_is_true_for_the_result(in_folder: Path) -> None:
    said = {"ss_network_dim": "2", "ss_network_alpha": "1", "ss_output_name": "mine",
            "sshs_model_hash": "0xstale", "lora_adapter_metadata": "{}"}  # fmt: skip
    write(in_folder / "a.safetensors", lora(rank=2), said)
    write(in_folder / "b.safetensors", lora(rank=3), {"ss_training_comment": "other"})
    succeed("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")
    found = metadata(in_folder / "ab.safetensors")
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "5"
    assert found["ss_output_name"] == "mine"
    assert len(found["sshs_model_hash"]) == 64
    assert "lora_adapter_metadata" not in found
    assert "ss_training_comment" not in found
    assert [a["file"] for a in json.loads(found["lycotool.merge"])["inputs"]] == [
        "a.safetensors",
        "b.safetensors",
    ]
    succeed("merge", "a.safetensors", "b.safetensors", "-o", "u.safetensors", "--metadata", "union")
    assert metadata(in_folder / "u.safetensors")["ss_training_comment"] == "other"
    succeed("merge", "a.safetensors", "b.safetensors", "-o", "n.safetensors", "--metadata", "none")
    assert "ss_output_name" not in metadata(in_folder / "n.safetensors")


def test_half_precision_is_kept_and_mixed_widens(in_folder: Path) -> None:
    for name, dtype in (("h", torch.float16), ("b", torch.bfloat16)):
        write(in_folder / f"{name}.safetensors", {k: t.to(dtype) for k, t in lora().items()})
    succeed("merge", "h.safetensors", "h.safetensors", "-o", "hh.safetensors")
    succeed("merge", "h.safetensors", "b.safetensors", "-o", "hb.safetensors")
    key = "lora_unet_down_a.lora_up.weight"
    assert read(in_folder / "hh.safetensors")[key].dtype == torch.float16
    assert read(in_folder / "hb.safetensors")[key].dtype == torch.float32


def test_dry_run_writes_nothing_and_says_the_same(in_folder: Path) -> None:
    write(in_folder / "base.safetensors", checkpoint())
    write(in_folder / "a.safetensors", lora())
    plan = json.loads(succeed("merge", "base.safetensors", "a.safetensors", "-n", "--json").stdout)
    assert not (in_folder / "base+a.safetensors").exists()
    done = json.loads(succeed("merge", "base.safetensors", "a.safetensors", "--json").stdout)
    assert plan.pop("dry_run") is True
    assert done.pop("dry_run") is False
    assert plan == done


def test_quiet_prints_the_path_alone(in_folder: Path) -> None:
    write(in_folder / "base.safetensors", checkpoint())
    write(in_folder / "a.safetensors", lora(alpha=None))
    result = succeed("merge", "base.safetensors", "a.safetensors", "-q")
    assert result.stdout == "base+a.safetensors\n"
    assert result.stderr == ""


def test_unmatched_modules_are_named(in_folder: Path) -> None:
    write(in_folder / "base.safetensors", checkpoint())
    write(in_folder / "a.safetensors", {**lora(), **lora("lora_unet_elsewhere")})
    result = succeed("merge", "base.safetensors", "a.safetensors")
    assert "1 of 2 modules match no layer: lora_unet_elsewhere" in result.stderr


def test_file_whose_name_ends_like_a_strength(in_folder: Path) -> None:
    write(in_folder / "base.safetensors", checkpoint())
    write(in_folder / "a:1", lora())
    assert run("merge", "base.safetensors", "a:1", "-o", "out.safetensors").exit_code == 0


SPARSE = {
    "lora_unet_down_a.bias_indices": torch.tensor([[0, 50], [0, 1]], dtype=torch.int16),
    "lora_unet_down_a.bias_values": torch.ones(2),
    "lora_unet_down_a.bias_size": torch.tensor([6, 5], dtype=torch.int16),
}


@pytest.mark.parametrize(
    ("second", "more", "message"),
    [
        (lora(width=9), (), "columns differ: 5 in a.safetensors and 9 in b.safetensors"),
        (
            lora(width=9),
            ("--base", "base.safetensors"),
            "b.safetensors: lora_unet_down_a: is made for a 6x9 weight",
        ),
        (
            {**lora(), **SPARSE},
            (),
            "b.safetensors: lora_unet_down_a: bias_indices point outside a [6, 5] matrix",
        ),
        (
            {**lora(), **SPARSE},
            ("--method", "ties", "--density", 1),
            "b.safetensors: lora_unet_down_a: bias_indices point outside",
        ),
    ],
)
def test_the_file_that_does_not_fit_is_named(
    second: dict[str, torch.Tensor],
    more: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("base.safetensors"), checkpoint())
    write(Path("a.safetensors"), lora())
    write(Path("b.safetensors"), second)
    result = run("merge", "a.safetensors", "b.safetensors", *more)
    assert result.exit_code == 5
    assert message in result.stderr
