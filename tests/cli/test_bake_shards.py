"""Sharded outputs as users ask for them; what loaders make of them is in tests/oracles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import lora, read, run, succeed, write
from safetensors import safe_open
from torch import Tensor

PREFIX = "model.diffusion_model."


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors", lora("lora_unet_blocks_3_a", 20, 25))
    return tmp_path


def model() -> dict[str, Tensor]:
    """Eleven layers of 2000 bytes."""
    generator = torch.Generator().manual_seed(0)
    return {f"{PREFIX}blocks.{i}.a.weight": torch.randn(20, 25, generator=generator) for i in range(11)}


def shards_of(index: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    weight_map: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        found = read(Path(index).parent / name)
        assert all(weight_map[key] == name for key in found)
        tensors |= found
    assert tensors.keys() == weight_map.keys()
    return tensors, weight_map


@pytest.mark.parametrize(
    ("size", "count"),
    [("4000", 6), ("4KB", 6), ("3.9KB", 11), ("3.91KiB", 6), ("1KB", 11), ("8 kb", 3), ("0.000022GB", 1)],
)
def test_sizes_are_decimal_or_binary(size: str, count: int) -> None:
    write(Path("model.safetensors"), model())
    result = succeed("bake", "model.safetensors", "a.safetensors", "--shard-size", size, "--json")
    report = json.loads(result.stdout)
    assert report["files"] == count
    succeed("bake", "model.safetensors", "a.safetensors", "-o", "whole.safetensors")
    whole = read(Path("whole.safetensors"))
    if count == 1:  # as with transformers and diffusers, one file needs no index
        assert report["output"] == "model-baked.safetensors"
        found = read(Path("model-baked.safetensors"))
        assert not Path("model-baked.safetensors.index.json").exists()
    else:
        assert report["output"] == "model-baked.safetensors.index.json"
        found, weight_map = shards_of(report["output"])
        names = sorted(set(weight_map.values()))
        assert names == [f"model-baked-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for name in names:
            with safe_open(name, "pt") as file:  # transformers refuses shards without it
                assert file.metadata()["format"] == "pt"
                assert "lycotool.bake" in file.metadata()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    "option", [("--shard-size", "5GB"), ("--vae", "a.safetensors"), ("--title", "mine")], ids=str
)
def test_options_of_checkpoints_are_refused_for_adapters(option: tuple[str, ...]) -> None:
    result = run("merge", "a.safetensors", "a.safetensors", *option)
    assert result.exit_code == 2
    assert f"{option[0]}: BASE is an adapter here" in result.stderr


@pytest.mark.parametrize("size", ["0", "-1GB", "5 gigs", "GB", "5TB", "1e9", "5GBs", "inf", "5,0GB"])
def test_no_sizes(size: str) -> None:
    write(Path("model.safetensors"), model())
    result = run("bake", "model.safetensors", "a.safetensors", f"--shard-size={size}")
    assert result.exit_code == 2
    assert size in result.stderr
    assert not list(Path().glob("model-baked*"))


def test_the_path_that_loaders_take_is_printed() -> None:
    write(Path("model.safetensors"), model())
    result = succeed("bake", "model.safetensors", "a.safetensors", "--shard-size", "8KB")
    assert result.stdout == "model-baked.safetensors.index.json\n"


def test_an_index_as_output_is_sharded_even_in_one_file() -> None:
    write(Path("model.safetensors"), model())
    result = succeed("bake", "model.safetensors", "a.safetensors", "-o", "out.safetensors.index.json")
    assert result.stdout == "out.safetensors.index.json\n"
    _, weight_map = shards_of("out.safetensors.index.json")
    assert set(weight_map.values()) == {"out-00001-of-00001.safetensors"}


def test_a_sharded_input_gives_one_file_unless_asked() -> None:
    """The output's name tells: .safetensors is one file, .safetensors.index.json keeps the shards."""
    write(Path("whole.safetensors"), model())
    succeed("bake", "whole.safetensors", "--shard-size", "8KB", "-o", "in.safetensors")
    succeed("bake", "whole.safetensors", "a.safetensors", "-o", "expected.safetensors")
    expected = read(Path("expected.safetensors"))
    succeed("bake", "in.safetensors.index.json", "a.safetensors")
    assert not Path("in-baked.safetensors.index.json").exists()
    succeed("bake", "in.safetensors.index.json", "a.safetensors", "-o", "kept.safetensors.index.json")
    kept, weight_map = shards_of("kept.safetensors.index.json")
    before = shards_of("in.safetensors.index.json")[1]
    assert {key: name.replace("kept-", "in-") for key, name in weight_map.items()} == before
    for found in (read(Path("in-baked.safetensors")), kept):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_same_bytes_again() -> None:
    write(Path("model.safetensors"), model())
    found = []
    for _ in range(2):
        succeed(
            "bake", "model.safetensors", "a.safetensors", "--shard-size", "8KB", "-o", "o.safetensors", "-f"
        )
        found.append({path.name: path.read_bytes() for path in Path().glob("o*")})
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_existing_files_are_kept_unless_forced() -> None:
    write(Path("model.safetensors"), model())
    arguments = ("bake", "model.safetensors", "a.safetensors", "--shard-size", "4KB", "-o", "o.safetensors")
    succeed(*arguments)
    assert run(*arguments).exit_code == 7
    bigger = (*arguments[:4], "8KB", *arguments[5:])
    assert run(*bigger).exit_code == 7
    succeed(*bigger, "--force")
    assert len(list(Path().glob("o-*"))) == 3  # and none of the six of before
    assert run(*arguments[:5], "-o", "model.safetensors", "--force").exit_code == 7


def test_standard_output_takes_one_file() -> None:
    write(Path("model.safetensors"), model())
    result = run("bake", "model.safetensors", "a.safetensors", "--shard-size", "4KB", "-o", "-")
    assert result.exit_code == 2
    assert "several files" in result.stderr


def test_dry_run_counts_the_files() -> None:
    write(Path("model.safetensors"), model())
    result = succeed("bake", "model.safetensors", "a.safetensors", "--shard-size", "4KB", "-n")
    assert "in 6 files" in result.stderr
    assert not list(Path().glob("model-baked*"))


def test_nothing_to_bake() -> None:
    write(Path("model.safetensors"), model())
    result = run("bake", "model.safetensors")
    assert result.exit_code == 2
    assert "nothing to bake" in result.stderr


@pytest.mark.parametrize("option", [("--unbake",), ("--te", "0.5"), ("--lbw", "MIDD")], ids=str)
def test_options_of_adapters_need_one(option: tuple[str, ...]) -> None:
    write(Path("model.safetensors"), model())
    result = run("bake", "model.safetensors", "--dtype", "fp16", *option)
    assert result.exit_code == 2
    assert "none is named" in result.stderr


def test_cast_or_divided_without_an_adapter() -> None:
    before = model()
    write(Path("model.safetensors"), before)
    succeed("bake", "model.safetensors", "--dtype", "fp16", "--shard-size", "2KB", "-o", "o.safetensors")
    found, _ = shards_of("o.safetensors.index.json")
    assert all(torch.equal(found[key], before[key].half()) for key in before)


def test_pickled_components_become_safetensors() -> None:
    """A folder's .bin files are read with --allow-pickle, and written under a name that says what they are."""
    Path("pipe/unet").mkdir(parents=True)
    Path("pipe/text_encoder").mkdir()
    state = {"blocks.3.a.weight": torch.randn(20, 25)}
    torch.save(state, "pipe/unet/diffusion_pytorch_model.bin")
    torch.save({"text_model.b.weight": torch.ones(2, 2)}, "pipe/text_encoder/pytorch_model.bin")
    succeed("bake", "pipe", "a.safetensors", "--allow-pickle", "-o", "out")
    names = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    assert names == {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert read(Path("out/unet/diffusion_pytorch_model.safetensors")).keys() == state.keys()


def test_a_dequantised_component_forgets_its_quantisation() -> None:
    """Transformers and diffusers would look for scales beside the weights."""
    Path("pipe/unet").mkdir(parents=True)
    config = {"_class_name": "X", "quantization_config": {"quant_method": "fp8"}}
    Path("pipe/unet/config.json").write_text(json.dumps(config))
    state = {
        "blocks.3.a.weight": torch.randn(20, 25).to(torch.float8_e4m3fn),
        "blocks.3.a.weight_scale_inv": torch.ones(1, 1),
    }
    write(Path("pipe/unet/diffusion_pytorch_model.safetensors"), state)
    succeed("bake", "pipe", "a.safetensors", "-o", "kept")
    succeed("bake", "pipe", "a.safetensors", "--dtype", "bf16", "-o", "plain")
    assert json.loads(Path("kept/unet/config.json").read_text()) == config
    assert json.loads(Path("plain/unet/config.json").read_text()) == {"_class_name": "X"}
    assert read(Path("plain/unet/diffusion_pytorch_model.safetensors")).keys() == {"blocks.3.a.weight"}
