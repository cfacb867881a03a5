"""What a run writes is what it trained: baked, loaded by others, named and described as the field does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read, succeed
from safetensors import safe_open
from training.runs import Records, base_file, base_folder, options, write_pictures

from lycotool.ops.train import train
from lycotool.training.bases.hashes import old_hash_of, sha256_of
from lycotool.training.bases.load import load_base
from lycotool.training.bases.predict import predict
from lycotool.training.bases.text import encode_text

PRESET = Path(__file__).resolve().parents[1] / "makers" / "sd1_preset.toml"

#: Networks whose files are baked: every algorithm, and the forms that change a file.
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"dim": 4},
    "lora-dora-cp": {"algo": "lora", "dim": 4, "dora_wd": True, "use_conv_cp": True, "rs_lora": True},
    "loha": {"dim": 2, "use_scalar": True},
    "lokr": {"factor": 4},
    "full": {"train_norm": True, "lr": 1e-3},
    "glora": {"dim": 4},
    "dylora": {"dim": 4, "block_size": 2},
    "boft": {"dim": 4},
    "diag-oft": {"dim": 4, "rescaled": True},
    "ia3": {},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "images")


def trained(pictures: Path, output: Path, family: Any = "sd1", **values: Any) -> Path:
    given = {"lr": 2e-2, "steps": 2, "save_dtype": "fp32", "output": str(output), **values}
    result = train(options(pictures, family, **given), observer=Records())
    assert result.outputs[0] == str(output)
    return output


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def unet_output(path: str | Path) -> torch.Tensor:
    """What a checkpoint predicts for a fixed input and caption."""
    base = load_base(str(path))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.randint(0, 49406, (2, 77), generator=generator)
    ids[:, -1] = 49407
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
    with torch.no_grad():
        text = encode_text(base, [ids] * len(base.text_encoders))
        return predict(base, noisy, torch.tensor([100, 700]), text, sizes)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_baked_file_predicts_what_was_trained(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward equals merge: the live network and the checkpoint with its file baked in."""
    from lycotool.training import between

    live: list[torch.Tensor] = []
    original = between.Between._write

    def write(self: Any, *arguments: Any, **named: Any) -> list[str]:
        paths = original(self, *arguments, **named)
        with between.evaluating(self._run):
            base = self._run.base
            generator = torch.Generator().manual_seed(0)
            noisy = torch.randn(2, 4, 8, 8, generator=generator)
            ids = torch.randint(0, 49406, (2, 77), generator=generator)
            ids[:, -1] = 49407
            text = encode_text(base, [ids])
            live.append(predict(base, noisy, torch.tensor([100, 700]), text))
        return paths

    monkeypatch.setattr(between.Between, "_write", write)
    adapter = trained(pictures, tmp_path / "a.safetensors", **{"algo": name, **NETWORKS[name]})
    succeed("bake", base_folder("sd1"), adapter, "-o", tmp_path / "baked")
    before, after = unet_output(base_folder("sd1")), unet_output(tmp_path / "baked")
    change = (live[0] - before).abs().max()
    assert change > 1e-3
    # Both in float32; the live one adds op(x, ΔW) to op(x, W), the other rounds W + ΔW.
    assert (after - live[0]).abs().max() < 2e-4 * max(1.0, float(live[0].abs().max()))


def test_lycoris_and_diffusers_load_it_with_the_same_output(pictures: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from lycoris.kohya import create_network

    adapter = trained(pictures, tmp_path / "a.safetensors", dim=4, train_te=False)
    succeed("bake", base_folder("sd1"), adapter, "-o", tmp_path / "baked")
    expected = unet_output(tmp_path / "baked")
    base = load_base(str(base_folder("sd1")))
    encoder = base.text_encoders[0]
    # LyCORIS 4.1.3 refuses its own default preset on SD 1 (a layer is named twice).
    network = create_network(
        1.0, 4, 2.0, None, encoder, base.unet, preset=str(PRESET), conv_dim=4, conv_alpha=2.0
    )
    network.apply_to(encoder, base.unet, apply_text_encoder=False, apply_unet=True)
    loaded = network.load_state_dict(read(adapter), strict=False)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if key.startswith("lora_unet_")]
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.randint(0, 49406, (2, 77), generator=generator)
    ids[:, -1] = 49407
    with torch.no_grad():
        text = encode_text(base, [ids])
        lycoris = predict(base, noisy, torch.tensor([100, 700]), text)
    assert len(network.unet_loras) == 83
    assert (lycoris - expected).abs().max() < 1e-4

    pipeline = StableDiffusionPipeline.from_pretrained(
        base_folder("sd1"), safety_checker=None, local_files_only=True
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    with torch.no_grad():
        found = pipeline.unet(
            noisy, torch.tensor([100, 700]), encoder_hidden_states=text.hidden, return_dict=False
        )[0]
    # diffusers scales in another order.
    assert (found - expected).abs().max() < 1e-4


def test_metadata_is_what_the_field_reads(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    values = {"dim": 4, "alpha": 2.0, "train_te": False, "training_comment": "note", "metadata_author": "me",
              "min_snr_gamma": 5.0, "lr": 1e-3, "optimizer_arg": ("weight_decay=0.1",)}  # fmt: skip
    first = trained(pictures, tmp_path / "a.safetensors", **values)
    found = metadata(first)
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_v2": "False",
        "ss_base_model_version": "sd_v1", "ss_output_name": "a", "ss_steps": "2", "ss_epoch": "2", "ss_seed": "42",
        "ss_learning_rate": "0.001", "ss_unet_lr": "0.001", "ss_text_encoder_lr": "None",
        "ss_optimizer": "adamw(weight_decay=0.1)", "ss_num_train_images": "4", "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": "1", "ss_resolution": "(16, 16)", "ss_min_snr_gamma": "5.0",
        "ss_training_comment": "note", "ss_sd_model_name": "sd1.safetensors", "ss_mixed_precision": "no",
        "ss_new_sd_model_hash": sha256_of(base_file("sd1")), "ss_sd_model_hash": old_hash_of(base_file("sd1")),
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.title": "a",
        "modelspec.resolution": "16x16", "modelspec.prediction_type": "epsilon", "modelspec.author": "me",
        "modelspec.date": "2023-11-14T22:13:20", "modelspec.sai_model_spec": "1.0.1",
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert json.loads(found["ss_network_args"])["algo"] == "lora"
    assert json.loads(found["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(found["ss_tag_frequency"])["images"]["a red disk"] == 1
    assert json.loads(found["ss_bucket_info"])["buckets"]["0"] == {"resolution": [16, 16], "count": 4}
    # Nothing of the machine.
    assert not [
        key for key, value in found.items() if str(tmp_path.parent) in value or str(pictures.parent) in value
    ]
    report = json.loads(succeed("inspect", first, "--hashes", "--json").stdout)
    assert '"matches": false' not in json.dumps(report).lower()
    again = (
        trained(pictures, tmp_path / "b" / "a.safetensors", **values)
        if (tmp_path / "b").mkdir() is None
        else first
    )
    assert first.read_bytes() == again.read_bytes()


def test_without_metadata_loaders_still_find_what_they_need(pictures: Path, tmp_path: Path) -> None:
    file = trained(pictures, tmp_path / "a.safetensors", metadata=False, train_te=False, algo="loha", dim=2)
    assert set(metadata(file)) - {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"} == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
        "ss_network_args",
    }  # fmt: skip
    assert metadata(file)["ss_network_module"] == "lycoris.kohya"


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_saved_dtype(name: str, dtype: torch.dtype, pictures: Path, tmp_path: Path) -> None:
    file = trained(
        pictures, tmp_path / "a.safetensors", save_dtype=name, train_te=False, preset="attn-only", steps=1
    )
    assert {t.dtype for key, t in read(file).items() if not key.endswith("alpha")} == {dtype}


def test_names_of_an_sdxl_unet(pictures: Path, tmp_path: Path) -> None:
    values = {"train_te": False, "preset": "attn-only", "steps": 1}
    native = trained(pictures, tmp_path / "a.safetensors", "sdxl", **values)
    other = trained(pictures, tmp_path / "b.safetensors", "sdxl", names="diffusers", **values)
    assert any(key.startswith("lora_unet_input_blocks_") for key in read(native))
    assert any(key.startswith("lora_unet_down_blocks_") for key in read(other))
    assert metadata(native)["ss_base_model_version"] == "sdxl_base_v1-0"
    expected, found = (
        sorted(t.flatten()[0].item() for k, t in read(f).items() if "down" in k.split(".")[1])
        for f in (native, other)
    )
    assert expected == pytest.approx(found) or len(expected) == len(found)


def test_another_format(pictures: Path, tmp_path: Path) -> None:
    kohya = trained(pictures, tmp_path / "a.safetensors", train_te=False, preset="attn-only", steps=1)
    other = trained(
        pictures, tmp_path / "b.safetensors", train_te=False, preset="attn-only", steps=1, format="diffusers"
    )
    assert all(key.startswith("unet.") for key in read(other))
    succeed("convert", kohya, "--to", "diffusers", "-o", tmp_path / "c.safetensors")
    expected, found = read(tmp_path / "c.safetensors"), read(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]


def test_a_split_dylora(pictures: Path, tmp_path: Path) -> None:
    values = {
        "algo": "dylora",
        "dim": 4,
        "block_size": 2,
        "conv_dim": 0,
        "train_te": False,
        "split_dylora": True,
    }
    whole = trained(pictures, tmp_path / "a.safetensors", steps=1, **values)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-r2.safetensors", "a-r4.safetensors", "a.safetensors",
    ]  # fmt: skip
    part, full = read(tmp_path / "a-r2.safetensors"), read(whole)
    key = next(key for key in full if key.endswith("lora_down.weight"))
    assert torch.equal(part[key], full[key][:2])


def test_saves_on_the_way_and_which_are_kept(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    values = {
        "batch_size": 2,
        "steps": 5,
        "save_every_n_steps": 1,
        "keep_saves": 2,
        "train_te": False,
        "preset": "attn-only",
    }
    trained(pictures, output, save_state_on_train_end=True, **values)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-step00000003.safetensors", "a-step00000004.safetensors", "a.safetensors", "a.state"]
    assert metadata(tmp_path / "a-step00000003.safetensors")["ss_steps"] == "3"
    trained(
        pictures,
        tmp_path / "b.safetensors",
        **{**values, "save_every_n_steps": None, "save_every_n_epochs": 1, "steps": 4},
    )
    assert sorted(path.name for path in tmp_path.glob("b*")) == ["b-000001.safetensors", "b.safetensors"]
