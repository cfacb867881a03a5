"""``lycotool bake`` as users type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, checkpoint, lora, read, succeed, write
from safetensors import safe_open


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_default_name(in_folder: Path) -> None:
    write(in_folder / "model.safetensors", checkpoint())
    write(in_folder / "a.safetensors", lora())
    assert succeed("bake", "model.safetensors", "a.safetensors").stdout == "model-baked.safetensors\n"


def test_several_adapters_all_refer_to_the_original(in_folder: Path) -> None:
    """(IA)³ after (IA)³: patched one after the other they would multiply, not add."""
    key = "model.diffusion_model.down.a.weight"
    base = checkpoint()
    write(in_folder / "model.safetensors", base)
    vectors = [torch.rand(6), torch.rand(6)]
    for index, vector in enumerate(vectors):
        tensors = {"lora_unet_down_a.weight": vector, "lora_unet_down_a.on_input": torch.tensor(0)}
        write(in_folder / f"{index}.safetensors", tensors)
    succeed("bake", "model.safetensors", "0.safetensors:0.5", "1.safetensors", "-o", "out.safetensors")
    expected = base[key].double() * (1 + 0.5 * vectors[0].double() + vectors[1].double())[:, None]
    found = read(in_folder / "out.safetensors")[key]
    assert (found - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_untouched_tensors_and_metadata_are_kept(in_folder: Path) -> None:
    base = checkpoint() | {
        "first_stage_model.half": torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
        "counter": torch.tensor(3, dtype=torch.int32),
    }
    write(in_folder / "model.safetensors", base, {"format": "pt", "note": "mine"})
    write(in_folder / "a.safetensors", lora())
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "out.safetensors")
    found = read(in_folder / "out.safetensors")
    for key in ("first_stage_model.half", "counter", "first_stage_model.untouched.weight"):
        assert found[key].dtype == base[key].dtype
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), base[key].reshape(-1).view(torch.uint8))
    with safe_open(in_folder / "out.safetensors", "pt") as file:
        assert file.metadata()["note"] == "mine"
        assert json.loads(file.metadata()["lycotool.bake"])["base"] == "model.safetensors"


def test_zero_strength_gives_the_checkpoint_back(in_folder: Path) -> None:
    base = checkpoint()
    write(in_folder / "model.safetensors", base)
    write(in_folder / "a.safetensors", {**lora(), "lora_unet_down_a.dora_scale": torch.rand(6, 1)})
    succeed("bake", "model.safetensors", "a.safetensors:0", "-o", "out.safetensors")
    found = read(in_folder / "out.safetensors")
    assert all(torch.equal(found[key], base[key]) for key in base)


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp8_e4m3fn", torch.float8_e4m3fn)],
)
def test_dtype(option: str, dtype: torch.dtype, in_folder: Path) -> None:
    write(in_folder / "model.safetensors", checkpoint() | {"counter": torch.tensor(3)})
    write(in_folder / "a.safetensors", lora())
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "out.safetensors", "--dtype", option)
    found = read(in_folder / "out.safetensors")
    assert found.pop("counter").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_fp8_checkpoint_is_changed_in_float32_and_rounded_once(in_folder: Path) -> None:
    key = "model.diffusion_model.down.a.weight"
    base = {key: torch.randn(6, 5).to(torch.float8_e4m3fn)}
    write(in_folder / "model.safetensors", base)
    adapter = lora()
    write(in_folder / "a.safetensors", adapter)
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "out.safetensors")
    module = "lora_unet_down_a"
    change = 0.5 * adapter[f"{module}.lora_up.weight"] @ adapter[f"{module}.lora_down.weight"]
    expected = (base[key].float() + change).to(torch.float8_e4m3fn)
    found = read(in_folder / "out.safetensors")[key]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_strengths_of_dora(in_folder: Path) -> None:
    """The three named conventions, from their formulas in float64."""
    key = "model.diffusion_model.down.a.weight"
    base, adapter = checkpoint(), lora(alpha=2.0)
    m = torch.rand(6, 1) + 0.5
    write(in_folder / "model.safetensors", base)
    write(in_folder / "a.safetensors", {**adapter, "lora_unet_down_a.dora_scale": m})
    w, m = base[key].double(), m.double()
    change = (adapter["lora_unet_down_a.lora_up.weight"].double()
              @ adapter["lora_unet_down_a.lora_down.weight"].double())  # fmt: skip

    def turned(v: torch.Tensor) -> torch.Tensor:
        return m * v / v.norm(dim=1, keepdim=True)

    s, v = 0.7, w + change
    expected = {
        "linear": w + s * (turned(v) - w),
        "lycoris": v * (s * (m / v.norm(dim=1, keepdim=True) - 1) + 1),
        "peft": turned(w + s * change),
    }
    for convention, value in expected.items():
        output = f"{convention}.safetensors"
        succeed(
            "bake", "model.safetensors", f"a.safetensors:{s}", "-o", output, "--dora-strength", convention
        )
        # A handful of float32 operations on values of the size of W.
        assert (read(in_folder / output)[key] - value).abs().max() <= 1e-6 * value.abs().max()


def diffusers_folder(folder: Path) -> Path:
    for component in ("unet", "text_encoder"):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text("{}")
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", {"down.a.weight": torch.randn(6, 5)})
    write(folder / "text_encoder" / "model.safetensors", {"text_model.b.weight": torch.randn(6, 5)})
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"an old copy")
    return folder


def test_diffusers_folder_gives_a_folder(in_folder: Path) -> None:
    source = diffusers_folder(in_folder / "pipe")
    write(in_folder / "a.safetensors", {**lora(), **lora("lora_te_text_model_b")})
    assert succeed("bake", "pipe", "a.safetensors").stdout == "pipe-baked\n"
    names = {
        str(p.relative_to(in_folder / "pipe-baked"))
        for p in (in_folder / "pipe-baked").rglob("*")
        if p.is_file()
    }
    assert names == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors",
    }  # fmt: skip
    for file, key in (
        ("unet/diffusion_pytorch_model", "down.a.weight"),
        ("text_encoder/model", "text_model.b.weight"),
    ):
        name = f"{file}.safetensors"
        assert not torch.equal(read(in_folder / "pipe-baked" / name)[key], read(source / name)[key])
    assert not list(in_folder.glob(".lycotool*"))


def test_diffusers_folder_is_not_replaced_unasked(in_folder: Path) -> None:
    diffusers_folder(in_folder / "pipe")
    write(in_folder / "a.safetensors", lora())
    from helpers import run

    (in_folder / "out").mkdir()
    (in_folder / "out" / "kept").write_text("x")
    assert run("bake", "pipe", "a.safetensors", "-o", "out").exit_code == 7
    assert (in_folder / "out" / "kept").exists()
    succeed("bake", "pipe", "a.safetensors", "-o", "out", "--force")
    assert not (in_folder / "out" / "kept").exists()
    assert (in_folder / "out" / "model_index.json").exists()


def test_sharded_checkpoint(in_folder: Path) -> None:
    tensors = checkpoint()
    shards = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        name = f"model-{number}.safetensors"
        write(in_folder / name, {key: tensor})
        shards[key] = name
    (in_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    write(in_folder / "whole.safetensors", tensors)
    write(in_folder / "a.safetensors", lora())
    succeed("bake", "model.safetensors.index.json", "a.safetensors", "-o", "x.safetensors")
    succeed("bake", "whole.safetensors", "a.safetensors", "-o", "y.safetensors")
    x, y = read(in_folder / "x.safetensors"), read(in_folder / "y.safetensors")
    assert x.keys() == y.keys()
    assert all(torch.equal(x[key], y[key]) for key in x)


def test_peft_folder_on_the_sample_checkpoint(in_folder: Path) -> None:
    result = succeed("bake", DATA / "base.safetensors", DATA / "peft_lora", "-o", "out.safetensors", "--json")
    report = json.loads(result.stdout)
    assert report["adapters"][0]["matched"] == report["changed"] == 128


@pytest.mark.parametrize(
    ("option", "value"),
    [("fp16", 7e4), ("fp8_e4m3fn", 500.0), ("fp8_e5m2", 6.2e4), ("bf16", 3.4e38)],
)
@pytest.mark.parametrize("key", ["down.a.weight", "untouched.weight"])
def test_overflow_of_every_dtype(key: str, option: str, value: float, in_folder: Path) -> None:
    """Of changed tensors and of those that are cast only."""
    from helpers import run

    base = {f"model.diffusion_model.{name}.weight": torch.zeros(6, 5) for name in ("down.a", "untouched")}
    base[f"model.diffusion_model.{key}"][0, 0] = value
    write(in_folder / "model.safetensors", base)
    write(in_folder / "a.safetensors", lora())
    result = run("bake", "model.safetensors", "a.safetensors", "--dtype", option, "-o", "out.safetensors")
    assert result.exit_code == 6
    assert key in result.stderr
    assert not (in_folder / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp32"])
def test_layers_one_after_the_other_in_the_same_memory(dtype: str, in_folder: Path) -> None:
    """Larger and smaller than the layer before: each has its own sum, rounded once to what is written."""
    torch.manual_seed(0)
    sizes = {"a": (6, 5), "b": (40, 30), "c": (3, 7), "d": (41, 30), "e": (2, 2)}
    base = {f"unet.{name}.weight": torch.randn(size).half() for name, size in sizes.items()}
    adapter = {
        key: tensor
        for name, (out, width) in sizes.items()
        for key, tensor in lora(f"lora_unet_{name}", out=out, width=width).items()
    }
    write(in_folder / "base.safetensors", base)
    write(in_folder / "a.safetensors", adapter)
    succeed(
        "bake",
        "base.safetensors",
        "a.safetensors",
        "-o",
        "out.safetensors",
        "--dtype",
        dtype,
        "--device",
        "cpu",
    )
    found = read(in_folder / "out.safetensors")
    written = {"keep": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for name in sizes:
        up, down = (adapter[f"lora_unet_{name}.lora_{side}.weight"] for side in ("up", "down"))
        scale = float(adapter[f"lora_unet_{name}.alpha"]) / down.shape[0]
        exact = base[f"unet.{name}.weight"].double() + scale * up.double() @ down.double()
        got = found[f"unet.{name}.weight"]
        assert got.dtype == written
        # Half a unit in the last place of what is written, and a few roundings of float32 before.
        allowed = torch.finfo(written).eps / 2 + 8 * torch.finfo(torch.float32).eps
        assert (got.double() - exact).abs().max() <= allowed * exact.abs().max()
