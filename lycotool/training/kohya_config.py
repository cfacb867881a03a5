"""Training configs of sd-scripts: ``--config_file`` TOML, or the same keys as JSON.

A file is taken as sd-scripts means it: what it leaves out has sd-scripts' default where that
makes another training than ours, and a key that cannot be honoured is an error, unless its
value is the one it has without being written. All such keys are listed at once. Sections are
cosmetic, as in sd-scripts. Source: sd-scripts ``train_network.py`` and ``library/train_util.py``
at 48d368fa.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lycotool.errors import BadInputError, UsageError
from lycotool.io.nearest import nearest_file
from lycotool.io.toml import read_toml
from lycotool.training.config import all_options, convert, nearest
from lycotool.training.network_options import parse_argument
from lycotool.training.prompts import SAMPLER_ALIASES

#: Defaults of sd-scripts that make another training than ours do.
DEFAULTS: Mapping[str, object] = {
    "learning_rate": 2e-6,
    "network_dim": 4,
    "network_alpha": 1.0,
    "enable_bucket": False,
    "max_bucket_reso": 1024,
    "caption_extension": ".caption",
    "mixed_precision": "no",
}

#: Keys that change nothing here: how it is done there, or where.
HARMLESS = frozenset(
    {
        "sdpa", "xformers", "mem_eff_attn", "max_data_loader_n_workers", "persistent_data_loader_workers",
        "lowram", "highvram", "tokenizer_cache_dir", "config_file", "output_config", "no_half_vae",
        "vae_batch_size", "text_encoder_batch_size", "skip_cache_check", "cache_info", "ddp_timeout",
        "ddp_gradient_as_bucket_view", "ddp_static_graph", "disable_mmap_load_safetensors", "console_log_level",
        "console_log_file", "console_log_simple", "log_prefix", "log_tracker_name", "log_tracker_config",
        "log_config", "wandb_run_name", "save_last_n_epochs_state", "save_last_n_steps_state",
        "full_fp16", "full_bf16", "use_safetensors", "dataset_class", "debug_dataset", "v2",
        "skip_until_initial_step", "torch_compile", "dynamo_backend",
    }
)  # fmt: skip

#: Keys that nothing here does, with the value that asks for nothing.
UNSUPPORTED: Mapping[str, object] = {
    "huggingface_repo_id": None, "huggingface_repo_type": None, "huggingface_path_in_repo": None,
    "huggingface_token": None, "huggingface_repo_visibility": None, "save_state_to_huggingface": False,
    "resume_from_huggingface": False, "async_upload": False, "wandb_api_key": None, "save_n_epoch_ratio": None,
    "lr_scheduler_type": "",
    "initial_epoch": None, "initial_step": None, "base_weights": None, "base_weights_multiplier": None,
    "color_aug": False, "face_crop_aug_range": None, "alpha_mask": False, "masked_loss": False,
    "weighted_captions": False, "conditioning_data_dir": None, "in_json": None,
    "cpu_offload_checkpointing": False, "blocks_to_swap": None, "weighting_scheme": "uniform",
    "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "deepspeed": False, "sample_every_n_seconds": None,
    "optimizer_schedulefree_wrapper": False, "schedulefree_wrapper_args": None, "dry_run": False,
}  # fmt: skip

_PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_SAVED = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}

#: ``--network_module`` to algorithm; LyCORIS' own says it in ``network_args``.
_MODULES = {
    "networks.lora": "lora",
    "networks.dylora": "dylora",
    "lycoris.kohya": None,
    "lycoris.locon_kohya": None,
}


def read_kohya_config(path: str) -> dict[str, Any]:
    """The values of a training config by our option names.

    Raises
    ------
    UsageError
        Listing every key that cannot be honoured, and every value that cannot be read.
    """
    given = _flat(_document(path))
    reader = _Reader({**DEFAULTS, **{key: value for key, value in given.items() if value is not None}})
    values = reader.read()
    if reader.faults:
        raise UsageError(
            f"{len(reader.faults)} keys of sd-scripts cannot be honoured",
            path=path,
            details=reader.faults,
            hint="remove them; the rest is understood",
        )
    return values


def _document(path: str) -> dict[str, Any]:
    if not path.lower().endswith(".json"):
        return read_toml(path)
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError("no such file", path=path, hint=nearest_file(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"is no JSON: {error}", path=path) from None
    if not isinstance(document, dict):
        raise BadInputError("is no JSON object", path=path)
    return document


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Without sections; a later key wins, as in sd-scripts."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


class _Reader:
    """Turns keys into values one by one, and collects what cannot be."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.values: dict[str, Any] = {}
        self.faults: list[str] = []
        self._names = {kohya: entry for entry in all_options().values() for kohya in entry.kohya}
        self._special: dict[str, Callable[[Any], None]] = {
            "pretrained_model_name_or_path": lambda v: self._set("base", str(v)),
            "train_data_dir": lambda v: self._set("dataset", str(v)),
            "dataset_config": lambda v: self._set("dataset", str(v)),
            "output_dir": lambda v: None,
            "output_name": self._output_name,
            "v_parameterization": lambda v: self._set("prediction", "v_prediction" if v else None),
            "network_module": self._network_module,
            "network_args": self._network_args,
            "network_train_unet_only": lambda v: self._set("train_te", False if v else None),
            "network_train_text_encoder_only": lambda v: self._set("train_unet", False if v else None),
            "optimizer_args": lambda v: self._set("optimizer_arg", tuple(map(str, _listed(v)))),
            "optimizer_type": lambda v: self._set("optimizer", str(v) or None),
            "use_8bit_adam": lambda v: self._set("optimizer", "adamw8bit" if v else None),
            "use_lion_optimizer": lambda v: self._set("optimizer", "lion" if v else None),
            "text_encoder_lr": lambda v: self._set("te_lr", tuple(map(float, _listed(v)))),
            "lr_scheduler_args": self._scheduler_args,
            "max_train_steps": lambda v: self._set("steps", None if self.given.get("max_train_epochs") else int(v)),
            "fp8_base": lambda v: self._set("base_dtype", "fp8" if v else None),
            "fp8_base_unet": lambda v: self._set("base_dtype", "fp8" if v else None),
            "mixed_precision": lambda v: self._choose("precision", _PRECISIONS, v, "mixed_precision"),
            "save_precision": lambda v: self._choose("save_dtype", _SAVED, v, "save_precision"),
            "save_model_as": lambda v: self._only("save_model_as", v, "safetensors"),
            "log_with": lambda v: self._only("log_with", v, "tensorboard"),
            "save_last_n_epochs": lambda v: self._set("keep_saves", int(v)),
            "save_last_n_steps": self._last_steps,
            "save_state": lambda v: self._set("save_state", bool(v)),
            "no_metadata": lambda v: self._set("metadata", not v),
            "cache_latents": lambda v: None,
            "cache_latents_to_disk": lambda v: self._set("cache_latents", "disk" if v else None),
            "cache_text_encoder_outputs": lambda v: self._set("train_te", False if v else None),
            "cache_text_encoder_outputs_to_disk": lambda v: self._set("cache_text", "disk" if v else None),
            "caption_extention": lambda v: self._set("caption_extension", str(v)),
            "noise_offset": lambda v: self._set("noise_offset", float(v)),
            "resolution": self._resolution,
            "sample_sampler": lambda v: self._set("sample_sampler", SAMPLER_ALIASES.get(str(v), str(v))),
        }  # fmt: skip

    def read(self) -> dict[str, Any]:
        """All keys."""
        for key, value in self.given.items():
            try:
                self._one(key, value)
            except (ValueError, TypeError):
                self.faults.append(f"{key}: cannot read {value!r}")
            except UsageError as error:
                self.faults.append(f"{key}: {error.message}")
        return {name: value for name, value in self.values.items() if value is not None}

    def _one(self, key: str, value: Any) -> None:  # noqa: ANN401 - anything a file holds
        if key in self._special:
            self._special[key](value)
        elif key in self._names:
            entry = self._names[key]
            self._set(entry.name, None if value == "" else convert(entry, value))
        elif key in UNSUPPORTED:
            if value not in (UNSUPPORTED[key], None, False, "", []):
                self.faults.append(f"{key} = {value!r}: not supported")
        elif key not in HARMLESS:
            known = [*self._names, *self._special, *HARMLESS, *UNSUPPORTED]
            self.faults.append(f"{key}: unknown{nearest(key, known)}")

    def _set(self, name: str, value: Any) -> None:  # noqa: ANN401 - any option's value
        if value is not None:
            self.values[name] = value

    def _choose(self, name: str, choices: Mapping[str, str], value: object, key: str) -> None:
        if str(value) not in choices:
            raise UsageError(f"{value!r}, expected one of {', '.join(choices)}")
        self._set(name, choices[str(value)])

    def _only(self, key: str, value: object, expected: str) -> None:
        if value not in (expected, "", None):
            raise UsageError(f"{value!r}, only {expected} is supported")

    def _output_name(self, value: object) -> None:
        folder = Path(str(self.given.get("output_dir") or "."))
        self._set("output", str(folder / f"{value}.safetensors"))

    def _network_module(self, value: object) -> None:
        if value not in _MODULES:
            raise UsageError(f"{value!r} is not supported", hint="one of " + ", ".join(_MODULES))
        if (algo := _MODULES[str(value)]) is not None:
            self.values.setdefault("algo", algo)
            arguments = [str(pair) for pair in _listed(self.given.get("network_args") or [])]
            if not any(pair.startswith(("conv_dim", "conv_lora_dim")) for pair in arguments):
                self.values.setdefault("conv_dim", 0)  # sd-scripts' own module leaves 3x3 convolutions out

    def _network_args(self, value: object) -> None:
        for pair in _listed(value):
            key, equals, text = str(pair).partition("=")
            if not equals:
                raise UsageError(f"{pair!r} is not key=value")
            name, parsed = parse_argument(key.strip(), text.strip())
            self.values[name] = parsed

    def _scheduler_args(self, value: object) -> None:
        for pair in _listed(value):
            key, _, text = str(pair).partition("=")
            if key.strip() != "step_rules":
                raise UsageError(f"{key.strip()} is not supported")
            self._set("lr_scheduler_rules", text.strip().strip("'\""))

    def _last_steps(self, value: Any) -> None:  # noqa: ANN401 - anything a file holds
        """Files of the last so many steps: that many, at the distance they are saved at."""
        every = self.given.get("save_every_n_steps")
        if every:
            self._set("keep_saves", int(value) // int(every) + 1)

    def _resolution(self, value: object) -> None:
        self._set(
            "resolution",
            convert(all_options()["resolution"], value if isinstance(value, list) else str(value)),
        )


def _listed(value: object) -> Sequence[Any]:
    if isinstance(value, list):
        return value
    return str(value).split() if isinstance(value, str) else [value]
