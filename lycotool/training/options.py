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
from lycotool.training.diffusion_options import LossOptions, NoiseOptions
from lycotool.training.network_options import NetworkOptions
from lycotool.training.output_options import (
    LogOptions,
    MetadataOptions,
    SampleOptions,
    SaveOptions,
    ValidationOptions,
)
from lycotool.training.schedules import ScheduleName

_MODEL, _PARTS, _LENGTH, _OPTIMIZER = "Base model", "What is trained", "Length", "Optimizer"
_SCHEDULE, _COMPUTE = "Learning-rate schedule", "Computing"

#: Steps of a run that says neither steps nor epochs: sd-scripts' default.
DEFAULT_STEPS = 1600


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
    fused_backward: bool = option(
        False,
        _OPTIMIZER,
        "Move each parameter as soon as its gradient is complete, and free the gradient: saves the memory of all gradients; for `--max-grad-norm 0`, without accumulation, fp16 and CUDA graphs.",
        kohya="fused_backward_pass",
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
class ComputeOptions:
    """Where and in which precision."""

    device: str = option(
        "auto",
        _COMPUTE,
        "Where to compute; auto is cuda, then mps, then cpu.",
        metavar="auto|cpu|cuda[:N]|mps",
    )
    gpus: str = option(
        "1",
        _COMPUTE,
        "Train on so many GPUs, a process and `--batch-size` images on each; auto is all there are. Learning "
        "rates stay as they are.",
        metavar="N|auto",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        _COMPUTE,
        "Of the base model; adapters are fp32 always. auto is bf16 on a GPU that has it, else fp32.",
    )
    vae_precision: Literal["fp32", "bf16", "fp16"] = option("fp32", _COMPUTE, "Of the VAE.")
    base_dtype: Literal["fp8", "int8"] | None = option(
        None,
        _COMPUTE,
        "Hold the frozen weights of layers in 8 bits: half their memory, more time. The adapter is trained on weights that are rounded so; default as `--precision`.",
    )
    gradient_checkpointing: bool | None = option(
        None,
        _COMPUTE,
        "Compute activations again for the gradient: less memory, more time; by default where a run does not fit into the GPU without it.",
        kohya="gradient_checkpointing",
    )
    shard_optimizer: bool | None = option(
        None,
        _COMPUTE,
        "Shard the optimizer over the processes of `--gpus`, each of which keeps its state for a part of the parameters: less memory; by default from 256 million trained numbers on.",
    )
    cuda_graphs: bool = option(
        True,
        _COMPUTE,
        "Record a step on a GPU once for each shape of a batch, and replay it: much faster.",
    )
    triton: bool = option(
        True,
        _COMPUTE,
        "Own kernels for norms and gated activations on an NVIDIA GPU in half precision, where Triton works.",
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
