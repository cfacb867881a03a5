"""Training configs of sd-scripts mean here what they mean there, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lycotool.errors import BadInputError, UsageError
from lycotool.training import config
from lycotool.training.kohya_config import HARMLESS, UNSUPPORTED, read_kohya_config
from lycotool.training.options import TrainOptions

#: The shape of LyCORIS' own examples, and of most guides.
EXAMPLE = """
[model]
pretrained_model_name_or_path = "model.safetensors"
v2 = false
v_parameterization = false
clip_skip = 2

[dataset]
train_data_dir = "images"
resolution = "768,512"
enable_bucket = true
min_bucket_reso = 320
max_bucket_reso = 960
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.05
train_batch_size = 8
max_token_length = 150
cache_latents = true
cache_latents_to_disk = true

[network]
network_module = "lycoris.kohya"
network_dim = 100000
network_alpha = 1
network_args = ["algo=lokr", "preset=attn-mlp", "factor=6", "use_tucker=True"]

[optimizer]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
unet_lr = 2e-4
text_encoder_lr = 1e-4
lr_scheduler = "cosine"
lr_warmup_steps = 0.1
max_train_epochs = 10
max_train_steps = 1600
max_grad_norm = 1.0
mixed_precision = "bf16"
min_snr_gamma = 5
multires_noise_iterations = 10
multires_noise_discount = 0.3

[save]
output_dir = "out"
output_name = "name"
save_precision = "fp16"
save_model_as = "safetensors"
save_every_n_epochs = 2
save_last_n_epochs = 3
xformers = true
seed = 1
logging_dir = "logs"
log_with = "tensorboard"
"""


def read(tmp_path: Path, text: str, name: str = "a.toml") -> dict[str, Any]:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return read_kohya_config(str(file))


def build(tmp_path: Path, text: str) -> TrainOptions:
    return config.build(read(tmp_path, 'pretrained_model_name_or_path = "m"\ntrain_data_dir = "d"\n' + text))


def test_a_whole_example(tmp_path: Path) -> None:
    options = config.build(read(tmp_path, EXAMPLE))
    assert (options.base, options.dataset) == ("model.safetensors", "images")
    assert options.output == str(Path("out") / "name.safetensors")
    network, data, optimizer = options.network, options.data, options.optimizer
    assert (network.algo, network.preset, network.factor, network.use_conv_cp) == (
        "lokr",
        "attn-mlp",
        6,
        True,
    )
    assert (network.dim, network.alpha, network.conv_dim) == (100000, 1.0, None)
    assert (data.resolution, data.batch_size, data.max_token_length) == ((768, 512), 8, 150)
    assert (data.min_bucket_reso, data.max_bucket_reso, data.keep_tokens) == (320, 960, 1)
    assert (data.cache_latents, data.shuffle_caption, data.caption_dropout_rate) == ("disk", True, 0.05)
    assert (optimizer.optimizer, optimizer.unet_lr, optimizer.te_lr) == ("AdamW8bit", 2e-4, (1e-4,))
    assert optimizer.optimizer_arg == ("weight_decay=0.1", "betas=0.9,0.99")
    assert (options.schedule.lr_scheduler, options.schedule.lr_warmup_steps) == ("cosine", 0.1)
    # As in sd-scripts, epochs win.
    assert (options.length.steps, options.length.epochs, options.length.seed) == (None, 10, 1)
    assert (options.loss.min_snr_gamma, options.noise.multires_noise_iterations) == (5.0, 10)
    assert (options.compute.precision, options.save.save_dtype, options.save.keep_saves) == (
        "bf16",
        "fp16",
        3,
    )
    assert (options.model.clip_skip, options.log.tensorboard) == (2, "logs")


def test_what_is_left_out_has_the_default_of_sd_scripts(tmp_path: Path) -> None:
    options = build(tmp_path, 'network_module = "networks.lora"\n')
    assert (options.network.dim, options.network.alpha, options.network.conv_dim) == (4, 1.0, 0)
    assert (options.data.enable_bucket, options.data.max_bucket_reso) == (False, 1024)
    assert (options.data.caption_extension, options.optimizer.lr) == (".caption", 2e-6)
    assert options.compute.precision == "fp32"


@pytest.mark.parametrize(
    ("text", "group", "name", "value"),
    [
        ("v_parameterization = true", "model", "prediction", "v_prediction"),
        ("network_train_unet_only = true", "model", "train_te", False),
        ("network_train_text_encoder_only = true", "model", "train_unet", False),
        ("cache_text_encoder_outputs = true", "model", "train_te", False),
        ("text_encoder_lr = [1e-4, 2e-4]", "optimizer", "te_lr", (1e-4, 2e-4)),
        ("use_8bit_adam = true", "optimizer", "optimizer", "adamw8bit"),
        ("use_lion_optimizer = true", "optimizer", "optimizer", "lion"),
        ('network_module = "networks.dylora"', "network", "algo", "dylora"),
        ('lr_scheduler_args = ["step_rules=1:10,0.1"]', "schedule", "lr_scheduler_rules", "1:10,0.1"),
        ("save_every_n_steps = 100\nsave_last_n_steps = 250", "save", "keep_saves", 3),
        ("no_metadata = true", "metadata", "metadata", False),
        ("resolution = 640", "data", "resolution", (640, 640)),
        ("resolution = [640, 512]", "data", "resolution", (640, 512)),
        ('mixed_precision = "fp16"', "compute", "precision", "fp16"),
        ('sample_sampler = "k_euler_a"', "samples", "sample_sampler", "euler_a"),
        ('save_precision = "float"', "save", "save_dtype", "fp32"),
    ],
)
def test_keys_of_another_name_or_value(
    tmp_path: Path, text: str, group: str, name: str, value: object
) -> None:
    assert getattr(getattr(build(tmp_path, text), group), name) == value


def test_json_is_the_same(tmp_path: Path) -> None:
    text = json.dumps(
        {"pretrained_model_name_or_path": "m", "a": {"learning_rate": 1e-4, "max_train_steps": 5}}
    )
    values = read(tmp_path, text, "a.json")
    assert (values["base"], values["lr"], values["steps"]) == ("m", 1e-4, 5)


def test_everything_that_cannot_be_honoured_is_listed(tmp_path: Path) -> None:
    text = """
    color_aug = true
    alpha_mask = true
    network_module = "networks.oft"
    network_args = ["algo=lora", "unknown=1"]
    learning_rat = 1e-4
    save_model_as = "ckpt"
    noise_offset = "much"
    """
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    faults = sorted(caught.value.details)
    names = [
        "alpha_mask",
        "color_aug",
        "learning_rat",
        "network_args",
        "network_module",
        "noise_offset",
        "save_model_as",
    ]
    assert [fault.partition(":")[0].partition(" ")[0] for fault in faults] == names
    assert "did you mean learning_rate?" in faults[2]


@pytest.mark.parametrize("key", ["fp8_base", "fp8_base_unet"])
def test_eight_bit_weights(tmp_path: Path, key: str) -> None:
    assert build(tmp_path, f"{key} = true").compute.base_dtype == "fp8"
    assert build(tmp_path, f"{key} = false").compute.base_dtype is None


@pytest.mark.parametrize("value", [True, False])
def test_checkpointing_is_as_it_says(tmp_path: Path, value: bool) -> None:
    options = build(tmp_path, f"gradient_checkpointing = {str(value).lower()}")
    assert options.compute.gradient_checkpointing is value


def test_values_that_ask_for_nothing_are_accepted(tmp_path: Path) -> None:
    lines = ['color_aug = false', 'fp8_base = false', 'lr_scheduler_type = ""', "weighted_captions = false",
             'weighting_scheme = "uniform"', "xformers = true", "max_data_loader_n_workers = 8"]  # fmt: skip
    build(tmp_path, "\n".join(lines))


def test_no_key_is_in_two_tables() -> None:
    ours = {name for entry in config.all_options().values() for name in entry.kohya}
    assert not HARMLESS & UNSUPPORTED.keys()
    assert not ours & (HARMLESS | UNSUPPORTED.keys())


def test_files_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_kohya_config(str(tmp_path / "a.json"))
    with pytest.raises(BadInputError):
        read(tmp_path, "[", "b.json")
    with pytest.raises(BadInputError):
        read(tmp_path, "[]", "c.json")
