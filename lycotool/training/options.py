"""Everything a training run can be told, and nothing else that changes it.

:class:`TrainOptions` is the whole; its groups are frozen dataclasses whose fields are the
options. The command line, configuration files and the documentation are made from these
declarations (:mod:`lycotool.training.declare`, :mod:`lycotool.training.config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lycotool.training.data.options import DataOptions
from lycotool.training.declare import option
from lycotool.training.loss import HuberSchedule, LossType
from lycotool.training.network_options import NetworkOptions
from lycotool.training.schedules import ScheduleName

_MODEL, _PARTS, _LENGTH, _OPTIMIZER = "Base model", "What is trained", "Length", "Optimizer"
_SCHEDULE, _NOISE, _LOSS, _COMPUTE = "Learning-rate schedule", "Noise", "Loss", "Computing"
_SAVE, _RESUME, _METADATA, _LOG = "Saving", "Resuming", "Metadata", "Logs"
_VALIDATION, _SAMPLES = "Validation", "Sample images"

#: Steps of a run that says neither steps nor epochs: sd-scripts' default.
DEFAULT_STEPS = 1600

Sampler = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How the base model is read, and which parts of it get adapters."""

    prediction: Literal["epsilon", "v_prediction"] | None = option(
        None,
        _MODEL,
        "What the model predicts; default: what the checkpoint says, epsilon where it says nothing.",
    )
    vae: str | None = option(None, _MODEL, "Another VAE: a file or folder.", kohya="vae", metavar="PATH")
    clip_skip: int | None = option(
        None,
        _MODEL,
        "Use the text encoder's output of this many layers from the end; SDXL has its own rule.",
        kohya="clip_skip",
        unit="layers",
        minimum=1,
    )
    train_unet: bool = option(True, _PARTS, "Train the UNet.")
    train_te: bool = option(True, _PARTS, "Train the text encoders.")
    names: Literal["kohya", "diffusers"] = option(
        "kohya",
        _PARTS,
        "Module names of an SDXL UNet in the file: LDM's, as every UI reads, or diffusers'.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """How long a run is, and what makes it repeatable."""

    steps: int | None = option(
        None,
        _LENGTH,
        f"Optimizer steps; default {DEFAULT_STEPS}, or as `--epochs` says.",
        kohya="max_train_steps",
        unit="steps",
        minimum=1,
    )
    epochs: int | None = option(
        None,
        _LENGTH,
        "Passes over the data, instead of `--steps`.",
        kohya="max_train_epochs",
        unit="epochs",
        minimum=1,
    )
    gradient_accumulation_steps: int = option(
        1,
        _LENGTH,
        "Batches per optimizer step; the same as one batch of all their images.",
        kohya="gradient_accumulation_steps",
        unit="batches",
        minimum=1,
    )
    seed: int = option(42, _LENGTH, "Every random draw of the run follows from it.", kohya="seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """How parameters are moved."""

    optimizer: str = option(
        "adamw",
        _OPTIMIZER,
        "adamw, adafactor, lion, prodigy, sgd, sgdnesterov, adamw8bit, pagedadamw8bit, lion8bit, … or module.Class.",
        kohya="optimizer_type",
        metavar="NAME",
    )
    optimizer_arg: tuple[str, ...] = option(
        (),
        _OPTIMIZER,
        "An argument of the optimizer; may be given several times.",
        kohya="optimizer_args",
        metavar="NAME=VALUE",
    )
    lr: float | None = option(
        None,
        _OPTIMIZER,
        "Learning rate; default by algorithm: 2e-4, full 2e-6, ia3 5e-3, and 1 for prodigy.",
        kohya="learning_rate",
        minimum=0,
    )
    unet_lr: float | None = option(
        None,
        _OPTIMIZER,
        "Learning rate of the UNet; 0 leaves it out. Default `--lr`.",
        kohya="unet_lr",
        minimum=0,
    )
    te_lr: tuple[float, ...] = option(
        (),
        _OPTIMIZER,
        "Learning rate of the text encoders, or, given twice, of SDXL's first and second; 0 leaves one out. Default `--lr`.",
        kohya="text_encoder_lr",
        minimum=0,
    )
    max_grad_norm: float = option(
        1.0,
        _OPTIMIZER,
        "Gradients are scaled down to this norm; 0 leaves them.",
        kohya="max_grad_norm",
        minimum=0,
    )
    scale_weight_norms: float | None = option(
        None,
        _OPTIMIZER,
        "After each step, scale down weight changes whose norm is larger.",
        kohya="scale_weight_norms",
        minimum=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOptions:
    """How the learning rate changes over the run."""

    lr_scheduler: ScheduleName = option("constant", _SCHEDULE, "Shape of the schedule.", kohya="lr_scheduler")
    lr_warmup_steps: float = option(
        0.0,
        _SCHEDULE,
        "The learning rate rises from 0 in so many steps; below 1 a share of the run.",
        kohya="lr_warmup_steps",
        unit="steps",
        minimum=0,
    )
    lr_decay_steps: float = option(
        0.0,
        _SCHEDULE,
        "It falls in the last so many steps (warmup_stable_decay); below 1 a share of the run.",
        kohya="lr_decay_steps",
        unit="steps",
        minimum=0,
    )
    lr_scheduler_num_cycles: int = option(
        1, _SCHEDULE, "Cycles of a cosine.", kohya="lr_scheduler_num_cycles", unit="cycles", minimum=1
    )
    lr_scheduler_power: float = option(
        1.0, _SCHEDULE, "Exponent of polynomial.", kohya="lr_scheduler_power", minimum=0
    )
    lr_scheduler_min_lr_ratio: float = option(
        0.0,
        _SCHEDULE,
        "Smallest factor of cosine_with_min_lr and warmup_stable_decay.",
        kohya="lr_scheduler_min_lr_ratio",
        minimum=0,
        maximum=1,
    )
    lr_scheduler_timescale: int | None = option(
        None,
        _SCHEDULE,
        "Time scale of inverse_sqrt; default the warm-up, or 10000.",
        kohya="lr_scheduler_timescale",
        unit="steps",
        minimum=1,
    )
    lr_scheduler_rules: str | None = option(
        None, _SCHEDULE, "Factors of piecewise_constant.", metavar="F:STEP,…,F"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseOptions:
    """Which noise, at which times."""

    noise_offset: float = option(
        0.0, _NOISE, "Strength of a random shift of each channel.", kohya="noise_offset", minimum=0
    )
    noise_offset_random_strength: bool = option(
        False,
        _NOISE,
        "Draw that strength for each image, up to the given one.",
        kohya="noise_offset_random_strength",
    )
    adaptive_noise_scale: float | None = option(
        None,
        _NOISE,
        "Add this times the mean latent of a channel to its noise offset.",
        kohya="adaptive_noise_scale",
    )
    multires_noise_iterations: int = option(
        0,
        _NOISE,
        "Levels of multi-resolution noise; 0 is off.",
        kohya="multires_noise_iterations",
        unit="levels",
        minimum=0,
    )
    multires_noise_discount: float = option(
        0.3, _NOISE, "Factor on each coarser level.", kohya="multires_noise_discount", minimum=0
    )
    ip_noise_gamma: float = option(
        0.0,
        _NOISE,
        "Strength of noise added to the input alone (input perturbation).",
        kohya="ip_noise_gamma",
        minimum=0,
    )
    ip_noise_gamma_random_strength: bool = option(
        False,
        _NOISE,
        "Draw that strength for each image, up to the given one.",
        kohya="ip_noise_gamma_random_strength",
    )
    zero_terminal_snr: bool = option(
        False,
        _NOISE,
        "Rescale the noise schedule to end in pure noise; for v-prediction.",
        kohya="zero_terminal_snr",
    )
    min_timestep: int = option(
        0, _NOISE, "First time step that is drawn.", kohya="min_timestep", minimum=0, maximum=999
    )
    max_timestep: int = option(
        1000, _NOISE, "Time step before which drawing ends.", kohya="max_timestep", minimum=1, maximum=1000
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """How a prediction is judged."""

    loss_type: LossType = option("l2", _LOSS, "Loss of each element.", kohya="loss_type")
    huber_schedule: HuberSchedule = option(
        "snr", _LOSS, "How the threshold of huber and smooth_l1 follows the noise.", kohya="huber_schedule"
    )
    huber_c: float = option(0.1, _LOSS, "That threshold.", kohya="huber_c", minimum=1e-6)
    huber_scale: float = option(
        1.0,
        _LOSS,
        "Factor on it, for the schedules constant and exponential.",
        kohya="huber_scale",
        minimum=1e-6,
    )
    min_snr_gamma: float | None = option(
        None, _LOSS, "Min-SNR weighting with this γ; 5 is usual.", kohya="min_snr_gamma", minimum=0
    )
    debiased_estimation_loss: bool = option(
        False, _LOSS, "Debiased estimation weighting.", kohya="debiased_estimation_loss"
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False,
        _LOSS,
        "Weigh a v-prediction loss as that of the noise.",
        kohya="scale_v_pred_loss_like_noise_pred",
    )
    v_pred_like_loss: float | None = option(
        None,
        _LOSS,
        "Add the loss as v-prediction weighs it, times this.",
        kohya="v_pred_like_loss",
        minimum=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeOptions:
    """Where and in which precision."""

    device: str = option(
        "auto",
        _COMPUTE,
        "Where to compute; auto is cuda, then mps, then cpu.",
        metavar="auto|cpu|cuda[:N]|mps",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        _COMPUTE,
        "Of the base model; adapters are fp32 always. auto is bf16 on a GPU that has it, else fp32.",
    )
    vae_precision: Literal["fp32", "bf16", "fp16"] = option("fp32", _COMPUTE, "Of the VAE.")
    gradient_checkpointing: bool = option(
        False,
        _COMPUTE,
        "Compute activations again for the gradient: less memory, more time.",
        kohya="gradient_checkpointing",
    )


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

    log: str | None = option(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """A whole run.

    Attributes
    ----------
    base
        Checkpoint: a file or a diffusers folder.
    dataset
        A folder, dataset TOML or ``metadata.jsonl``.
    output
        The adapter's file; None is a name in the current folder.
    """

    base: str
    dataset: str
    output: str | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    data: DataOptions = field(default_factory=DataOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    log: LogOptions = field(default_factory=LogOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
