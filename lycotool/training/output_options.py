"""Options of what a run writes: adapters, states, metadata, logs, validation losses, images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lycotool.training.declare import option

_SAVE, _RESUME, _METADATA, _LOG = "Saving", "Resuming", "Metadata", "Logs"
_VALIDATION, _SAMPLES = "Validation", "Sample images"

Sampler = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """What is written, when, and how."""

    save_every_n_steps: int | None = option(
        None,
        _SAVE,
        "Also save the adapter every so many steps.",
        kohya="save_every_n_steps",
        unit="steps",
        minimum=1,
    )
    save_every_n_epochs: int | None = option(
        None,
        _SAVE,
        "Also save it every so many epochs.",
        kohya="save_every_n_epochs",
        unit="epochs",
        minimum=1,
    )
    keep_saves: int | None = option(
        None, _SAVE, "Keep so many of these, the latest; default all.", unit="files", minimum=1
    )
    save_dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", _SAVE, "dtype of the adapter's file.")
    format: str = option(
        "kohya",
        _SAVE,
        "Format of the file: kohya (networks.lora or lycoris.kohya), or any that `lycotool convert` has.",
        metavar="FORMAT",
    )
    split_dylora: bool = option(
        False, _SAVE, "Also save a DyLoRA as one LoRA for each multiple of its block size."
    )
    save_state: bool = option(
        True, _RESUME, "Keep what a resume needs beside the output, at every save and interruption."
    )
    save_state_on_train_end: bool = option(
        False, _RESUME, "Keep it when the run is complete, too.", kohya="save_state_on_train_end"
    )
    resume: str | None = option(
        None,
        _RESUME,
        "Continue from this folder; default OUTPUT.state if it fits.",
        kohya="resume",
        metavar="FOLDER",
    )
    fresh: bool = option(False, _RESUME, "Start anew, whatever OUTPUT.state holds.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataOptions:
    """What the file says of itself."""

    metadata: bool = option(
        True, _METADATA, "Write the training's numbers; without, what loaders need alone."
    )
    training_comment: str | None = option(
        None, _METADATA, "A comment (ss_training_comment).", kohya="training_comment"
    )
    metadata_title: str | None = option(
        None, _METADATA, "Title; default the file's name.", kohya="metadata_title"
    )
    metadata_author: str | None = option(None, _METADATA, "Author.", kohya="metadata_author")
    metadata_description: str | None = option(None, _METADATA, "Description.", kohya="metadata_description")
    metadata_license: str | None = option(None, _METADATA, "Licence.", kohya="metadata_license")
    metadata_tags: str | None = option(None, _METADATA, "Tags, with commas.", kohya="metadata_tags")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """What is written down while training."""

    log_file: str | None = option(
        None, _LOG, "Write a JSON object per line: every step, validation and save.", metavar="FILE"
    )
    tensorboard: str | None = option(
        None, _LOG, "Write TensorBoard's files to this folder.", kohya="logging_dir", metavar="FOLDER"
    )
    log_every: int | None = option(
        None,
        _LOG,
        "Fetch losses from the device every so many steps; default 1, on a GPU 10.",
        unit="steps",
        minimum=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """When the validation loss is computed; the data options say on which images."""

    validate_every_n_steps: int | None = option(
        None,
        _VALIDATION,
        "Validate every so many steps.",
        kohya="validate_every_n_steps",
        unit="steps",
        minimum=1,
    )
    validate_every_n_epochs: int | None = option(
        None,
        _VALIDATION,
        "Validate every so many epochs; default 1 if images are set aside.",
        kohya="validate_every_n_epochs",
        unit="epochs",
        minimum=1,
    )
    max_validation_steps: int | None = option(
        None,
        _VALIDATION,
        "Use so many batches at most.",
        kohya="max_validation_steps",
        unit="batches",
        minimum=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Images made while training."""

    sample_prompts: str | None = option(
        None,
        _SAMPLES,
        "Prompts, one per line, with `--n --w --h --d --s --l --ss`; or sd-scripts' TOML or JSON.",
        kohya="sample_prompts",
        metavar="FILE",
    )
    sample_every_n_steps: int | None = option(
        None,
        _SAMPLES,
        "Make images every so many steps.",
        kohya="sample_every_n_steps",
        unit="steps",
        minimum=1,
    )
    sample_every_n_epochs: int | None = option(
        None,
        _SAMPLES,
        "Make images every so many epochs.",
        kohya="sample_every_n_epochs",
        unit="epochs",
        minimum=1,
    )
    sample_at_first: bool = option(
        False, _SAMPLES, "Make images before the first step, too.", kohya="sample_at_first"
    )
    sample_sampler: Sampler = option(
        "ddim", _SAMPLES, "Sampler of prompts that name none.", kohya="sample_sampler"
    )
