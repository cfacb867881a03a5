"""What an adapter's file says of its training: sd-scripts' ``ss_*`` keys and ModelSpec's.

Sources: sd-scripts ``train_network.py`` and ``library/sai_model_spec.py`` at 48d368fa. All values
are ``str()`` of what sd-scripts has, so its readers find what they know. Paths are base names:
nothing of the machine goes into the file. ``SOURCE_DATE_EPOCH`` in the environment replaces
the clock, for bytes that are the same each time.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lycotool import __version__
from lycotool.models.families import FAMILIES
from lycotool.training.bases.model import BaseModel
from lycotool.training.data.dataset import Dataset
from lycotool.training.network_options import trainable
from lycotool.training.options import TrainOptions
from lycotool.training.plan import Plan
from lycotool.training.randomness import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: What is written without the rest; loaders read these.
MINIMUM = frozenset(
    {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
        "ss_network_args",
    }
)  # fmt: skip

#: Options whose sd-scripts name, with ``ss_`` before it, holds the value as it is.
_AS_THEY_ARE = {
    "optimizer": ("max_grad_norm", "scale_weight_norms", "unet_lr"),
    "schedule": ("lr_scheduler",),
    "model": ("clip_skip",),
    "length": ("gradient_accumulation_steps", "seed"),
    "compute": ("gradient_checkpointing",),
    "noise": (
        "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
        "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength", "zero_terminal_snr",
    ),
    "loss": ("loss_type", "huber_schedule", "huber_c", "huber_scale", "min_snr_gamma"),
    "metadata": ("training_comment",),
    "data": (
        "max_token_length", "flip_aug", "random_crop", "shuffle_caption", "enable_bucket",
        "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "keep_tokens", "caption_dropout_rate",
        "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "prior_loss_weight",
        "resize_interpolation", "validation_seed", "validation_split",
    ),
    "validation": ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
}  # fmt: skip


def now() -> float:
    """Seconds since 1970, or what ``SOURCE_DATE_EPOCH`` says."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return float(fixed) if fixed else time.time()


class RunMetadata:
    """The metadata of one run's files; what is the same in all of them is made once.

    Parameters
    ----------
    labels
        Kinds of the trained modules, as the registry names them.
    lrs
        Learning rate by component.
    optimizer
        Name and arguments, as sd-scripts writes them.
    """

    def __init__(
        self,
        options: TrainOptions,
        base: BaseModel,
        plan: Plan,
        *,
        labels: Iterable[str],
        lrs: Mapping[str, float],
        optimizer: str,
        started: float,
        title: str,
    ) -> None:
        self._keep_all = options.metadata.metadata
        self._started = started
        family = FAMILIES[base.family]
        is_v = base.prediction == "v_prediction"
        values: dict[str, Any] = {
            "ss_v2": base.family == "sd2",
            "ss_base_model_version": family.base_model_version
            + ("_v" if is_v and base.family != "sdxl" else ""),
        }
        values |= _network(options, set(labels))
        if self._keep_all:
            values |= _training(options, plan, lrs, optimizer, started, title)
            values |= _data(plan.dataset, plan.ranks)
            values |= _files(base)
        if not self._keep_all:
            values = {key: value for key, value in values.items() if key in MINIMUM}
        self._fixed = {key: str(value) for key, value in values.items()}
        if self._keep_all:
            self._fixed |= _model_spec(options, base, plan.dataset, title, started)
            self._fixed["lycotool.version"] = __version__

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """For a file written after ``step`` steps, in epoch ``epoch`` counted from 1."""
        if not self._keep_all:
            return dict(self._fixed)
        return self._fixed | {
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "ss_training_finished_at": str(now()),
        }


def _network(options: TrainOptions, labels: set[str]) -> dict[str, Any]:
    network = options.network
    training = trainable(network.algo)[1]
    has_rank = "dim" in training.arguments
    dim = (training.rank if network.dim is None else network.dim) if has_rank else None
    alpha = None if dim is None else (dim / 2 if network.alpha is None else network.alpha)
    plain = labels <= {"lora"}
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_dropout": network.dropout,
        "ss_network_args": json.dumps(network.network_args()),
    }


def _training(
    options: TrainOptions,
    plan: Plan,
    lrs: Mapping[str, float],
    optimizer: str,
    started: float,
    title: str,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        f"ss_{name}": getattr(getattr(options, group), name)
        for group, names in _AS_THEY_ARE.items()
        for name in names
    }
    text = [lr for component, lr in sorted(lrs.items()) if component != "unet"]
    return values | {
        "ss_session_id": seed_of(options.length.seed, "session", int(started)) % 2**32,
        "ss_training_started_at": started,
        "ss_output_name": title,
        "ss_learning_rate": max(lrs.values()),
        "ss_unet_lr": lrs.get("unet"),
        "ss_text_encoder_lr": (text[0] if len(set(text)) == 1 else text) if text else None,
        "ss_lr_warmup_steps": options.schedule.lr_warmup_steps,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
        "ss_num_epochs": plan.epochs,
        "ss_max_train_steps": plan.steps,
        "ss_mixed_precision": {"fp32": "no"}.get(options.compute.precision, options.compute.precision),
        "ss_full_fp16": False,
        "ss_cache_latents": options.data.cache_latents != "none",
        "ss_optimizer": optimizer,
        "ss_debiased_estimation": options.loss.debiased_estimation_loss,
        "ss_lowram": False,
        "ss_color_aug": False,
        "ss_face_crop_aug_range": None,
        "ss_fp8_base": options.compute.base_dtype == "fp8",
    }


def _data(dataset: Dataset, ranks: int) -> dict[str, Any]:
    regular = {True: 0, False: 0}
    folders: dict[bool, dict[str, dict[str, int]]] = {True: {}, False: {}}
    for index, subset in enumerate(dataset.subsets):
        members = [example for example in dataset.examples if example.subset == index]
        is_reg = subset.options.is_reg
        regular[is_reg] += sum(example.repeats for example in members)
        repeats = members[0].repeats if members else 0
        folders[is_reg][subset.source.name] = {"n_repeats": repeats, "img_count": len(members)}
    buckets = {
        str(number): {"resolution": list(size), "count": count}
        for number, ((_, size), count) in enumerate(dataset.buckets.items())
    }
    size = dataset.subsets[0].options.resolution
    first = dataset.batch_size_of(dataset.subsets[0].group)
    return {
        "ss_num_train_images": regular[False],
        "ss_num_reg_images": regular[True],
        "ss_num_validation_images": 0 if dataset.validation is None else len(dataset.validation.examples),
        "ss_batch_size_per_device": first,
        "ss_total_batch_size": first * ranks,
        "ss_resolution": size,
        "ss_dataset_dirs": json.dumps(folders[False], ensure_ascii=False),
        "ss_reg_dataset_dirs": json.dumps(folders[True], ensure_ascii=False),
        "ss_tag_frequency": json.dumps(dataset.tag_frequency(), ensure_ascii=False),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def _files(base: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {"ss_sd_model_name": Path(base.path).resolve().name}
    if base.sha256 is not None:
        found |= {"ss_sd_model_hash": base.old_hash, "ss_new_sd_model_hash": base.sha256}
    if base.vae_path is not None:
        found["ss_vae_name"] = Path(base.vae_path).resolve().name
    if base.vae_file is not None:
        found |= {"ss_vae_hash": base.vae_old_hash, "ss_new_vae_hash": base.vae_sha256}
    return found


def _model_spec(
    options: TrainOptions, base: BaseModel, dataset: Dataset, title: str, started: float
) -> dict[str, str]:
    is_v = base.prediction == "v_prediction"
    architecture = FAMILIES[base.family].model_spec
    if base.family == "sd2" and is_v:
        architecture = architecture.replace("v2-512", "v2-768-v")
    about = options.metadata
    size = dataset.subsets[0].options.resolution or (0, 0)
    noise = options.noise
    is_part = (noise.min_timestep, noise.max_timestep) != (0, 1000)
    date = datetime.datetime.fromtimestamp(int(started), tz=datetime.timezone.utc)
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": "https://github.com/Stability-AI/generative-models"
        if base.family == "sdxl"
        else "diffusers",
        "title": about.metadata_title or title,
        "resolution": f"{size[0]}x{size[1]}",
        "date": date.replace(tzinfo=None).isoformat(),
        "author": about.metadata_author,
        "description": about.metadata_description,
        "license": about.metadata_license,
        "tags": about.metadata_tags,
        "prediction_type": "v" if is_v else "epsilon",
        "timestep_range": f"{noise.min_timestep},{noise.max_timestep}" if is_part else None,
        "encoder_layer": None if options.model.clip_skip is None else str(options.model.clip_skip),
    }
    return {f"modelspec.{name}": value for name, value in found.items() if value is not None}
