"""From options to a run that is ready to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.devices import resolve_device
from lycotool.errors import UsageError
from lycotool.lazy import torch
from lycotool.training.bases.images import encode_images
from lycotool.training.bases.load import load_base
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.schedule import with_zero_terminal_snr
from lycotool.training.bases.text import encode_text
from lycotool.training.data.batches import plan_epoch
from lycotool.training.data.captions import caption_of
from lycotool.training.data.dataset import Dataset
from lycotool.training.data.latents import LatentCache, cache_latents
from lycotool.training.data.reading import read_dataset
from lycotool.training.data.texts import TextCache
from lycotool.training.diffusion import Diffusion, check_noise
from lycotool.training.inputs import InputMaker
from lycotool.training.loop import Run
from lycotool.training.loss_scale import LossScale
from lycotool.training.network import Network
from lycotool.training.network_options import trainable
from lycotool.training.observe import Observer
from lycotool.training.optimizers import known
from lycotool.training.optimizers.arguments import accepted_by, read_arguments
from lycotool.training.optimizers.stepper import Group, Stepper
from lycotool.training.options import ScheduleOptions, TrainOptions
from lycotool.training.plan import Plan
from lycotool.training.presets import Preset, read_preset
from lycotool.training.prompts import read_prompts
from lycotool.training.recorder import Recorder
from lycotool.training.samples import ImageMaker
from lycotool.training.schedules import Schedule, check_rules, steps_of
from lycotool.training.targets import Target, find_targets
from lycotool.training.validation import Validation

if TYPE_CHECKING:
    from lycotool.training.weights import Loaded

#: Steps between two looks at the losses on a device that one waits for.
_LOOK_EVERY = 10

#: Encoded captions held in memory at most.
_TEXT_BYTES = 2 * 2**30

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True)
class Trainable:
    """A base model with its network attached, and the data: all a dry run needs.

    Attributes
    ----------
    options
        With everything decided that was left to the model.
    lrs
        Learning rate by component.
    """

    options: TrainOptions
    base: BaseModel
    dataset: Dataset
    network: Network
    plan: Plan
    lrs: Mapping[str, float]


def prepare(
    options: TrainOptions,
    *,
    load_weights: Callable[[str], Mapping[str, Loaded]],
    base: BaseModel | None = None,
) -> Trainable:
    """Read the base and the data, and attach the network.

    Parameters
    ----------
    load_weights
        Reads the file of ``network_weights``.
    base
        A model in memory instead of ``options.base``.

    Raises
    ------
    LycotoolError
        As the parts say.
    """
    if not Path(options.dataset).exists():
        raise UsageError("no such file or folder", path=options.dataset)
    preset = read_preset(options.network.preset)
    optimizer = check_options(options)
    device = resolve_device(options.compute.device)
    precision = _precision(options.compute.precision, device)
    options = replace(options, compute=replace(options.compute, precision=precision))
    if base is None:
        base = load_base(
            options.base,
            prediction=options.model.prediction,
            unet_dtype=_dtype(precision),
            te_dtype=_dtype(precision),
            vae_dtype=_dtype(options.compute.vae_precision),
            device=device,
            vae=options.model.vae,
        )
    options = replace(options, data=options.data.for_family(base.family, base.prediction))
    dataset = read_dataset(options.dataset, options.data)
    lrs = learning_rates(options, base, optimizer.lr)
    targets = [target for target in _targets(options, base, preset, lrs) if target.component in lrs]
    weights = options.network.network_weights
    network = Network.build(
        targets,
        options.network,
        seed=options.length.seed,
        weights=None if weights is None else load_weights(weights),
    )
    network.to(base.device)
    used = set(network.components)
    lrs = {component: lr for component, lr in lrs.items() if component in used}
    return Trainable(options, base, dataset, network, Plan(dataset, options.length), lrs)


def check_options(options: TrainOptions) -> known.Known:
    """Refuse what can be seen to be wrong before any model is read; gives the optimizer.

    Raises
    ------
    UsageError
        Naming the option.
    """
    name = options.optimizer.optimizer
    optimizer = known.find(name)
    accepted = accepted_by(known.load(optimizer, name))
    given = read_arguments(options.optimizer.optimizer_arg, accepted, what=name)
    rates = options.optimizer
    if given.get("relative_step") and (rates.lr is not None or rates.unet_lr is not None or rates.te_lr):
        raise UsageError(
            "relative_step makes adafactor choose its learning rate itself; the one given does nothing",
            hint="leave out relative_step, or the learning rates",
        )
    if rates.unet_lr is not None and not options.model.train_unet:
        raise UsageError("--unet-lr does nothing with --no-train-unet")
    if rates.te_lr and not options.model.train_te:
        raise UsageError("--te-lr does nothing with --no-train-te")
    check_schedule(options.schedule)
    check_noise(options.noise)
    samples = options.samples
    asked = samples.sample_every_n_steps or samples.sample_every_n_epochs or samples.sample_at_first
    if samples.sample_prompts is None and asked:
        raise UsageError("sample images need prompts", hint="`--sample-prompts FILE`")
    if samples.sample_prompts is not None and not asked:
        raise UsageError(
            "--sample-prompts does nothing without a time",
            hint="`--sample-every-n-steps`, `--sample-every-n-epochs` or `--sample-at-first`",
        )
    return optimizer


def learning_rates(options: TrainOptions, base: BaseModel, own: float | None) -> dict[str, float]:
    """Learning rate of every component that is trained.

    Parameters
    ----------
    own
        The optimizer's, where it has one.

    Raises
    ------
    UsageError
        If nothing is trained, or a learning rate is for what is not.
    """
    given = options.optimizer
    default = given.lr
    if default is None:
        default = own if own is not None else trainable(options.network.algo)[1].learning_rate
    encoders = [f"te{number}" for number in range(1, len(base.text_encoders) + 1)]
    if len(given.te_lr) > len(encoders):
        raise UsageError(
            f"--te-lr is given {len(given.te_lr)} times, the model has {len(encoders)} text encoders"
        )
    text = given.te_lr if len(given.te_lr) == len(encoders) else (given.te_lr or (default,)) * len(encoders)
    wanted = {"unet": default if given.unet_lr is None else given.unet_lr} | dict(
        zip(encoders, text, strict=False)
    )
    explicit = {"unet": given.unet_lr is not None} | dict.fromkeys(encoders, bool(given.te_lr))
    model = options.model
    found = {
        component: lr
        for component, lr in wanted.items()
        if (model.train_unet if component == "unet" else model.train_te)
        and not (explicit[component] and lr == 0)
    }
    if not found:
        raise UsageError(
            "nothing is trained", hint="`--train-unet`, `--train-te`, and learning rates above 0"
        )
    return found


def _targets(
    options: TrainOptions, base: BaseModel, preset: Preset, lrs: Mapping[str, float]
) -> tuple[Target, ...]:
    return find_targets(
        base,
        preset,
        train_unet="unet" in lrs,
        train_te=any(component != "unet" for component in lrs),
        train_norm=options.network.train_norm,
        conv=options.network.conv_dim != 0,
        names=options.model.names,
    )


def make_run(ready: Trainable, observer: Observer) -> Run:
    """Fill the caches and make the optimizer.

    Raises
    ------
    LycotoolError
        As the parts say.
    """
    options, base, network = ready.options, ready.base, ready.network
    diffusion = diffusion_of(options, base)
    schedule = schedule_of(options.schedule, ready.plan.steps)
    stepper = Stepper(groups_of(ready), options.optimizer.optimizer, options.optimizer.optimizer_arg)
    latents = latents_of(options, base, ready.dataset, observer)
    texts = None if any(component != "unet" for component in ready.lrs) else texts_of(options, base)
    inputs = input_maker(ready, ready.dataset, latents, texts)
    if texts is not None:
        _fill_texts(ready, inputs, texts, observer)
    if options.compute.gradient_checkpointing:
        _checkpoint(base, ready.lrs)
    base.unet.train(options.compute.gradient_checkpointing)
    network.train()
    every = options.log.log_every or (_LOOK_EVERY if base.device.type == "cuda" else 1)
    return Run(
        base=base,
        network=network,
        plan=ready.plan,
        inputs=inputs,
        diffusion=diffusion,
        stepper=stepper,
        schedule=schedule,
        scale=LossScale(enabled=options.compute.precision == "fp16"),
        recorder=Recorder(base.device, every),
        clip_skip=options.model.clip_skip,
        max_grad_norm=options.optimizer.max_grad_norm,
        scale_weight_norms=options.optimizer.scale_weight_norms,
    )


def input_maker(
    ready: Trainable, dataset: Dataset, latents: LatentCache, texts: TextCache | None
) -> InputMaker:
    """Inputs of a data set, as the options want them."""
    return InputMaker(
        ready.base,
        dataset,
        latents,
        texts,
        noise=ready.options.noise,
        max_token_length=ready.options.data.max_token_length,
        seed=ready.options.length.seed,
        total_steps=ready.plan.steps,
    )


def diffusion_of(options: TrainOptions, base: BaseModel) -> Diffusion:
    """The noise schedule and loss of a run."""
    alphas = (
        with_zero_terminal_snr(base.base_alphas) if options.noise.zero_terminal_snr else base.alphas_cumprod
    )
    return Diffusion(
        options.noise,
        options.loss,
        alphas,
        v_prediction=base.prediction == "v_prediction",
        device=base.device,
    )


def check_schedule(options: ScheduleOptions) -> None:
    """Refuse numbers that have no use in a schedule.

    Raises
    ------
    UsageError
        Naming the option, and the schedules it is for.
    """
    name = options.lr_scheduler
    uses = {
        "lr_decay_steps": ("warmup_stable_decay",),
        "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
        "lr_scheduler_power": ("polynomial",),
        "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
        "lr_scheduler_timescale": ("inverse_sqrt",),
        "lr_scheduler_rules": ("piecewise_constant",),
    }
    defaults = ScheduleOptions()
    for option, names in uses.items():
        if getattr(options, option) != getattr(defaults, option) and name not in names:
            flag = "--" + option.replace("_", "-")
            raise UsageError(f"{flag} does nothing with {name}", hint="it is for " + ", ".join(names))
    if name == "piecewise_constant":
        if options.lr_warmup_steps:
            raise UsageError("--lr-warmup-steps does nothing with piecewise_constant")
        check_rules(options.lr_scheduler_rules or "")


def schedule_of(options: ScheduleOptions, total: int) -> Schedule:
    """The learning-rate schedule, its shares turned into steps.

    Raises
    ------
    UsageError
        If warm-up and decay are longer than the run.
    """
    warmup = steps_of(options.lr_warmup_steps, total, option="--lr-warmup-steps")
    decay = steps_of(options.lr_decay_steps, total, option="--lr-decay-steps")
    if warmup + decay > total:
        raise UsageError(f"warm-up and decay take {warmup + decay} steps, the training has {total}")
    return Schedule(
        name=options.lr_scheduler,
        total=total,
        warmup=warmup,
        decay=decay,
        cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        min_ratio=options.lr_scheduler_min_lr_ratio,
        timescale=options.lr_scheduler_timescale,
        rules=options.lr_scheduler_rules or "",
    )


def groups_of(ready: Trainable) -> list[Group]:
    """The network's parameters with their learning rates."""
    return [
        Group(
            group.component if group.lr_ratio == 1 else f"{group.component} x{group.lr_ratio:g}",
            ready.lrs[group.component] * group.lr_ratio,
            group.parameters,
        )
        for group in ready.network.parameter_groups()
    ]


def make_validation(ready: Trainable, run: Run, observer: Observer) -> Validation | None:
    """The validation of a run, if images were set aside.

    Raises
    ------
    UsageError
        If options ask for it and there are none.
    """
    when = ready.options.validation
    dataset = ready.dataset.validation
    if dataset is None:
        if (when.validate_every_n_steps, when.validate_every_n_epochs, when.max_validation_steps) != (
            None,
        ) * 3:
            raise UsageError("no images are set aside to validate on", hint="`--validation-split 0.1`")
        return None
    latents = latents_of(ready.options, ready.base, dataset, observer)
    inputs = input_maker(ready, dataset, latents, run.inputs.texts)
    seed = ready.options.data.validation_seed
    return Validation(inputs, ready.options.noise, seed=seed, limit=when.max_validation_steps)


def make_images(ready: Trainable, run: Run, output: Path) -> ImageMaker | None:
    """The sample images of a run, if there are prompts."""
    options = ready.options.samples
    if options.sample_prompts is None:
        return None
    size = ready.options.data.resolution
    assert size is not None
    return ImageMaker(
        ready.base,
        run.inputs,
        read_prompts(options.sample_prompts),
        alphas_cumprod=run.diffusion.alphas_cumprod,
        size=size,
        sampler=options.sample_sampler,
        seed=ready.options.length.seed,
        clip_skip=ready.options.model.clip_skip,
        folder=output.with_name(output.name.removesuffix(".safetensors") + "-samples"),
    )


def latents_of(options: TrainOptions, base: BaseModel, dataset: Dataset, observer: Observer) -> LatentCache:
    """Encode the images, or get ready to."""
    where = options.data.cache_latents
    folder = _cache_folder(options) if where == "disk" else None
    key = base.vae_fingerprint if where == "disk" else ""
    if where != "none":
        observer.start("encoding images", sum(1 for _ in dataset.examples))
    cache = cache_latents(
        dataset,
        lambda pixels: encode_images(base, pixels),
        key=key,
        where=where,
        folder=folder,
        advance=observer.advance,
    )
    for note in cache.notes:
        observer.warning(note)
    if where == "memory":
        cache.to(base.device)
    return cache


def texts_of(options: TrainOptions, base: BaseModel) -> TextCache:
    """The cache of frozen text encoders' outputs."""
    where = options.data.cache_text
    return TextCache(
        lambda ids: encode_text(base, ids, clip_skip=options.model.clip_skip),
        key=base.text_fingerprint if where == "disk" else "",
        clip_skip=options.model.clip_skip,
        folder=_cache_folder(options) if where == "disk" else None,
        limit=0 if where == "none" else _TEXT_BYTES,
    )


def _fill_texts(ready: Trainable, inputs: InputMaker, texts: TextCache, observer: Observer) -> None:
    """Encode the captions of the first epoch; others are encoded when they come."""
    if ready.options.data.cache_text == "none":
        return
    seed = ready.options.length.seed
    captions = {
        caption_of(ready.dataset, sample, seed=seed, epoch=0, step=0, total_steps=ready.plan.steps)
        for batch in plan_epoch(ready.dataset, seed=seed, epoch=0)
        for sample in batch.samples
    }
    observer.start("encoding captions", len(captions))
    texts.fill(inputs.token_ids(sorted(captions)), advance=observer.advance)


def _cache_folder(options: TrainOptions) -> Path:
    if options.data.cache_dir is not None:
        return Path(options.data.cache_dir)
    source = Path(options.dataset)
    return (source if source.is_dir() else source.parent) / ".lycotool-cache"


def _checkpoint(base: BaseModel, lrs: Mapping[str, float]) -> None:
    base.unet.enable_gradient_checkpointing()
    for number, encoder in enumerate(base.text_encoders, 1):
        if f"te{number}" in lrs:
            encoder.gradient_checkpointing_enable()
            encoder.train()


def _precision(name: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device) -> Precision:
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UsageError("fp16 is not for the CPU", hint="`--precision bf16` or fp32")
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def warnings_of(ready: Trainable) -> Sequence[str]:
    """What the user should know before training."""
    lr = max(ready.lrs.values())
    evidence = ready.base.predicts
    found = [*ready.base.warnings, *ready.dataset.warnings, *ready.options.network.warnings(lr)]
    if evidence.evidence:
        found.append(f"the model predicts {evidence.prediction}: {evidence.evidence}")
    return found
