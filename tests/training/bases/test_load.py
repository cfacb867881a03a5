"""Loading: the same weights from files and folders, strictly, without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import bases
from safetensors.torch import load_file, save_file
from training.bases.conftest import Bases

from lycotool.errors import BadInputError, IncompatibleError, UnsafeError, UsageError
from lycotool.io.store import TensorStore
from lycotool.training.bases import BaseModel, load_base

Edit = Callable[[dict[str, torch.Tensor]], None]


def _models(base: BaseModel | bases.MicroBase) -> tuple[Any, ...]:
    return base.unet, base.vae, *base.text_encoders


def _assert_loaded(base: BaseModel, made: bases.MicroBase, dtype: torch.dtype = torch.float32) -> None:
    for got, expected in zip(_models(base), _models(made), strict=True):
        own, theirs = got.state_dict(), expected.state_dict()
        assert own.keys() == theirs.keys()
        for name, value in own.items():
            assert value.dtype == dtype
            assert torch.equal(value, theirs[name].to(dtype)), name
        assert not got.training
        assert not any(parameter.requires_grad for parameter in got.parameters())
        for name, buffer in got.named_buffers():
            assert torch.equal(buffer, expected.get_buffer(name))


def _edited(source: Path, target: Path, edit: Edit) -> str:
    state = load_file(source)
    edit(state)
    save_file(state, target)
    return str(target)


@pytest.mark.parametrize("family", bases.FAMILIES)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_every_weight_arrives(on_disk: Bases, family: bases.Family, kind: str) -> None:
    disk = on_disk.get(family)
    base = load_base(str(getattr(disk, kind)))
    _assert_loaded(base, disk.made)
    assert base.family == family
    assert base.prediction == ("v_prediction" if family == "sd2" else "epsilon")
    assert base.latent_scale == (0.13025 if family == "sdxl" else 0.18215)
    assert base.pad_tokens == {"sd1": (49407,), "sd2": (0,), "sdxl": (49407, 0)}[family]
    assert base.pixels_per_latent == 2
    assert base.warnings == ()


@pytest.mark.parametrize("family", bases.FAMILIES)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files(
    on_disk: Bases, tmp_path: Path, family: bases.Family, stored: torch.dtype
) -> None:
    """Weights are rounded once, to what was asked for, from what is stored."""
    made = on_disk.get(family).made
    path = bases.write_file(made, tmp_path / "half.safetensors", dtype=stored)
    base = load_base(
        str(path),
        prediction="epsilon",
        unet_dtype=torch.bfloat16,
        te_dtype=torch.float16,
        vae_dtype=torch.float32,
    )
    first, second = made.unet.state_dict()["conv_in.weight"], base.unet.state_dict()["conv_in.weight"]
    assert torch.equal(second, first.to(stored).bfloat16())
    dtypes = [{parameter.dtype for parameter in model.parameters()} for model in _models(base)]
    assert dtypes[:2] == [{torch.bfloat16}, {torch.float32}]
    assert all(found == {torch.float16} for found in dtypes[2:])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_structure_alone(on_disk: Bases, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device no weight is read, and what does not fit is found all the same."""
    disk = on_disk.get("sdxl")
    monkeypatch.setattr(TensorStore, "tensor", None)
    base = load_base(str(getattr(disk, kind)), device="meta", unet_dtype=torch.bfloat16)
    for got, expected in zip(_models(base), _models(disk.made), strict=True):
        own, theirs = (dict(model.named_parameters()) for model in (got, expected))
        assert {name: value.shape for name, value in own.items()} == {
            name: value.shape for name, value in theirs.items()
        }
        assert all(value.is_meta and not value.requires_grad for value in own.values())
    assert {value.dtype for value in base.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_no_socket_is_opened(on_disk: Bases, family: bases.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = on_disk.get(family)

    def refuse(*_: object) -> None:
        raise AssertionError("a socket is opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for path in (disk.file, disk.folder):
        load_base(str(path))


# --- strictness ------------------------------------------------------------------------------

_CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
_TEXT = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias"
_VAE = "first_stage_model.decoder.mid.attn_1.q.weight"


@pytest.mark.parametrize(
    ("key", "label"),
    [(_CONV, "UNet"), (_TEXT, "text encoder 1"), (_VAE, "VAE"), ("first_stage_model.quant_conv.bias", "VAE")],
)
def test_a_missing_key_is_an_error(on_disk: Bases, tmp_path: Path, key: str, label: str) -> None:
    path = _edited(on_disk.get("sd1").file, tmp_path / "x.safetensors", lambda state: state.pop(key))
    with pytest.raises(BadInputError, match=f"the {label} does not fit") as caught:
        load_base(path)
    assert caught.value.details == (f"{key}: missing",)


def test_a_key_too_much_is_an_error(on_disk: Bases, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.0.extra.weight"
    path = _edited(
        on_disk.get("sd1").file, tmp_path / "x.safetensors", lambda state: state.update({key: torch.ones(2)})
    )
    with pytest.raises(BadInputError) as caught:
        load_base(path)
    assert caught.value.details == (f"{key}: not a parameter of this model",)


def test_a_wrong_shape_is_an_error(on_disk: Bases, tmp_path: Path) -> None:
    path = _edited(
        on_disk.get("sd1").file,
        tmp_path / "x.safetensors",
        lambda s: s.update({_CONV: s[_CONV][:, :16].clone()}),
    )
    with pytest.raises(BadInputError) as caught:
        load_base(path)
    assert caught.value.details == (f"{_CONV}: has shape [32, 16, 3, 3], expected [32, 32, 3, 3]",)


def test_a_long_list_is_cut(on_disk: Bases, tmp_path: Path) -> None:
    def edit(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if ".output_blocks." in key]:
            del state[key]

    with pytest.raises(BadInputError) as caught:
        load_base(_edited(on_disk.get("sd1").file, tmp_path / "x.safetensors", edit))
    assert len(caught.value.details) == 21
    assert caught.value.details[-1].startswith("and ")


@pytest.mark.parametrize(
    "key",
    [
        "model_ema.diffusion_modelinput_blocks00bias",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.logit_scale",
        "first_stage_model.loss.discriminator.main.0.weight",
        "global_step",
    ],
)
def test_keys_that_mean_nothing_are_passed_over(on_disk: Bases, tmp_path: Path, key: str) -> None:
    disk = on_disk.get("sd1")
    path = _edited(disk.file, tmp_path / "x.safetensors", lambda state: state.update({key: torch.ones(3)}))
    base = load_base(path)
    assert base.warnings == ()
    _assert_loaded(base, disk.made)


def test_tensors_beside_the_components_are_said(on_disk: Bases, tmp_path: Path) -> None:
    path = _edited(
        on_disk.get("sd1").file,
        tmp_path / "x.safetensors",
        lambda state: state.update({"a.b": torch.ones(3)}),
    )
    assert load_base(path).warnings == ("1 tensors are of no known component and are not used: a.b",)


def test_older_spellings(on_disk: Bases, tmp_path: Path) -> None:
    """A text encoder without ``text_model.``, and the attention of a VAE before diffusers 0.17."""
    disk = on_disk.get("sd1")

    def flatten(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if ".text_model." in key]:
            state[key.replace(".text_model.", ".")] = state.pop(key)

    _assert_loaded(load_base(_edited(disk.file, tmp_path / "x.safetensors", flatten)), disk.made)

    def rename(state: dict[str, torch.Tensor]) -> None:
        new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for key in list(state):
            for now, then in new.items():
                if f".{now}." in key:
                    state[key.replace(now, then)] = state.pop(key)

    folder = shutil.copytree(disk.folder, tmp_path / "folder")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    _edited(weights, weights, rename)
    _assert_loaded(load_base(str(folder)), disk.made)


def test_without_the_libraries(on_disk: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(on_disk.get("sd1").file)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="training needs diffusers") as caught:
        load_base(file)
    assert caught.value.hint == "pip install 'lycotool[train]'"


# --- what it is ------------------------------------------------------------------------------


def _without(prefix: str) -> Edit:
    def edit(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    return edit


@pytest.mark.parametrize(
    ("channels", "kind"), [(9, "an inpainting model of SD 1.x"), (8, "an image-editing model of SD 1.x")]
)
def test_other_inputs_are_refused(tmp_path: Path, channels: int, kind: str) -> None:
    made = bases.micro_base("sd1", in_channels=channels)
    for path in (
        bases.write_file(made, tmp_path / "x.safetensors"),
        bases.write_folder(made, tmp_path / "folder"),
    ):
        with pytest.raises(IncompatibleError, match=f"this is {kind}.* reads {channels} channels"):
            load_base(str(path))


def test_other_models_are_refused(on_disk: Bases, tmp_path: Path) -> None:
    sd1, sdxl = on_disk.get("sd1").file, on_disk.get("sdxl").file
    path = tmp_path / "x.safetensors"
    with pytest.raises(IncompatibleError, match="UNet but no text encoder"):
        load_base(_edited(sd1, path, _without("cond_stage_model.")))
    with pytest.raises(IncompatibleError, match="this base has no VAE"):
        load_base(_edited(sd1, path, _without("first_stage_model.")))

    def refine(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith("conditioner.")]:
            value = state.pop(key)
            if ".embedders.1." in key:
                state[key.replace(".1.", ".0.", 1)] = value

    with pytest.raises(IncompatibleError, match="refiner"):
        load_base(_edited(sdxl, path, refine))
    folder = shutil.copytree(on_disk.get("sdxl").folder, tmp_path / "folder")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(IncompatibleError, match="refiner"):
        load_base(str(folder))
    with pytest.raises(IncompatibleError, match="EDM"):
        load_base(_edited(sdxl, path, lambda state: state.update({"edm_vpred.sigma_max": torch.ones(1)})))
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2)}, path)
    with pytest.raises(IncompatibleError, match=r"this is Flux\.1"):
        load_base(str(path))
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 2)}, path)
    with pytest.raises(IncompatibleError, match="this is an adapter"):
        load_base(str(path))


def test_a_folder_that_lacks_a_config(on_disk: Bases, tmp_path: Path) -> None:
    folder = shutil.copytree(on_disk.get("sd1").folder, tmp_path / "folder")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(BadInputError, match="lacks the file") as caught:
        load_base(str(folder))
    assert str(caught.value.path).endswith("unet/config.json")


def test_a_folder_with_a_config_of_another_class(on_disk: Bases, tmp_path: Path) -> None:
    folder = shutil.copytree(on_disk.get("sd1").folder, tmp_path / "folder")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_class_name": "UNetMotionModel"}))
    with pytest.raises(BadInputError, match="its config is for UNetMotionModel"):
        load_base(str(folder))
    path.write_text(json.dumps(config | {"new_kind_of_attention": 3}))
    with pytest.raises(BadInputError, match="new_kind_of_attention"):
        load_base(str(folder))
    path.write_text(json.dumps(config | {"class_embed_type": "projection"}))
    with pytest.raises(IncompatibleError, match="unCLIP"):
        load_base(str(folder))
    path.write_text(json.dumps(config | {"down_block_types": ["Nonsense"] * 2}))
    with pytest.raises(BadInputError, match="can be built from its config"):
        load_base(str(folder))


# --- prediction type -------------------------------------------------------------------------


def test_prediction_is_found_where_files_tell_it(on_disk: Bases, tmp_path: Path) -> None:
    sdxl, sd2 = on_disk.get("sdxl"), on_disk.get("sd2")
    path = tmp_path / "x.safetensors"
    mark = torch.tensor([])

    def found(**options: Any) -> tuple[str, bool]:
        base = load_base(str(path), **options)
        return base.prediction, base.zero_terminal_snr

    bases.write_file(sdxl.made, path, extra={"v_pred": mark})
    assert found() == ("v_prediction", False)
    bases.write_file(sdxl.made, path, extra={"v_pred": mark, "ztsnr": mark})
    assert found() == ("v_prediction", True)
    bases.write_file(
        sdxl.made, path, extra={"v_pred": mark}, metadata={"modelspec.prediction_type": "epsilon"}
    )
    assert found() == ("epsilon", False)
    assert found(prediction="v") == ("v_prediction", False)
    with pytest.raises(UsageError, match="no such prediction type: 'noise'"):
        found(prediction="noise")
    bases.write_file(sdxl.made, path, metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(UsageError, match="its metadata has the prediction type 'flow'"):
        found()
    assert found(prediction="epsilon") == ("epsilon", False)

    bases.write_file(sd2.made, path)
    with pytest.raises(UsageError, match="nothing in this file tells which"):
        found()
    assert found(prediction="epsilon") == ("epsilon", False)

    folder = bases.write_folder(
        sd2.made, tmp_path / "folder", prediction="v_prediction", zero_terminal_snr=True
    )
    base = load_base(str(folder))
    assert (base.prediction, base.zero_terminal_snr) == ("v_prediction", True)
    config = folder / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    config.write_text(text.replace('"v_prediction"', '"sample"'))
    with pytest.raises(UsageError, match="its scheduler's config has the prediction type 'sample'"):
        load_base(str(folder))
    config.write_text(text.replace("DDIMScheduler", "EDMEulerScheduler"))
    with pytest.raises(IncompatibleError, match="its scheduler is EDMEulerScheduler"):
        load_base(str(folder))
    assert base.alphas_cumprod[-1] == 0
    assert base.base_alphas[-1] > 0


# --- VAE given apart, hashes -----------------------------------------------------------------


def test_a_vae_given_apart(on_disk: Bases, tmp_path: Path) -> None:
    disk, other = on_disk.get("sd1"), bases.micro_base("sd1", seed=9)
    state = bases.single_file(other)
    prefix = "first_stage_model."
    vae = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    bare, prefixed = tmp_path / "bare.safetensors", tmp_path / "prefixed.safetensors"
    save_file(vae, bare)
    save_file({prefix + key: value for key, value in vae.items()}, prefixed)
    plain = tmp_path / "diffusers.safetensors"
    save_file(other.vae.state_dict(), plain)
    folder = bases.write_folder(other, tmp_path / "folder")
    # Not the VAE's: its folder may be that of many models.
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel", "block_out_channels": [1]}')
    # A base without a VAE of its own will do.
    headless = _edited(disk.file, tmp_path / "x.safetensors", _without(prefix))
    for source in (bare, prefixed, plain, folder, folder / "vae"):
        base = load_base(headless, vae=str(source))
        expected = other.vae.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in base.vae.state_dict().items())
        assert torch.equal(base.unet.conv_in.weight, disk.made.unet.conv_in.weight)
        assert base.vae_path == str(source)
        assert (base.vae_file is None) == (source == folder)
        if base.vae_file is not None:
            data = base.vae_file.read_bytes()
            assert base.vae_sha256 == hashlib.sha256(data).hexdigest()
            assert base.vae_old_hash == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    with pytest.raises(IncompatibleError, match="not a VAE"):
        load_base(headless, vae=headless)


def test_fingerprints(on_disk: Bases, tmp_path: Path) -> None:
    """The same weights have one fingerprint wherever they come from; another weight, another one."""
    disk = on_disk.get("sdxl")
    file, folder = load_base(str(disk.file)), load_base(str(disk.folder))
    assert file.vae_fingerprint == folder.vae_fingerprint
    assert file.text_fingerprint == folder.text_fingerprint
    assert len({file.vae_fingerprint, file.text_fingerprint}) == 2
    half = load_base(str(disk.file), vae_dtype=torch.bfloat16, te_dtype=torch.bfloat16)
    assert half.vae_fingerprint != file.vae_fingerprint
    assert half.text_fingerprint != file.text_fingerprint

    def nudge(state: dict[str, torch.Tensor]) -> None:
        state["first_stage_model.decoder.conv_out.bias"][0] += 1e-3
        state["conditioner.embedders.1.model.ln_final.bias"][0] += 1e-3

    other = load_base(_edited(disk.file, tmp_path / "x.safetensors", nudge))
    assert other.vae_fingerprint != file.vae_fingerprint
    assert other.text_fingerprint != file.text_fingerprint


def test_content_hash(on_disk: Bases, tmp_path: Path) -> None:
    """It is that of the files, not of their place, and of another VAE's as well."""
    disk, other = on_disk.get("sd1"), on_disk.get("sd2")
    folder = shutil.copytree(disk.folder, tmp_path / "elsewhere")
    first = load_base(str(disk.folder))
    assert len(first.files) == 3
    assert load_base(str(folder)).content_hash == first.content_hash
    assert load_base(str(folder), vae=str(other.folder / "vae")).content_hash != first.content_hash
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    _edited(weights, weights, lambda state: state["quant_conv.bias"].add_(1))
    assert load_base(str(folder)).content_hash != first.content_hash
    file = load_base(str(disk.file))
    assert file.files == (disk.file,)
    assert len({file.content_hash, first.content_hash}) == 2


def test_pickles_only_when_allowed(on_disk: Bases, tmp_path: Path) -> None:
    disk = on_disk.get("sd1")
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(disk.file)}, path)
    with pytest.raises(UnsafeError):
        load_base(str(path))
    _assert_loaded(load_base(str(path), allow_pickle=True), disk.made)


def test_hashes(on_disk: Bases) -> None:
    disk = on_disk.get("sd1")
    base = load_base(str(disk.file))
    data = disk.file.read_bytes()
    assert base.sha256 == hashlib.sha256(data).hexdigest()
    assert base.old_hash == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert len(data) > 0x110000
    folder = load_base(str(disk.folder))
    assert (folder.sha256, folder.old_hash) == (None, None)
