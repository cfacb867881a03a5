"""From a base with its network attached to a run: caches, optimizer, validation, images."""

from __future__ import annotations

from pathlib import Path

from lycotool.distributed import World
from lycotool.errors import UsageError
from lycotool.lazy import torch
from lycotool.training.bases.images import encode_images
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.residence import bring, is_away, send_away
from lycotool.training.bases.schedule import with_zero_terminal_snr
from lycotool.training.bases.text import encode_text
from lycotool.training.checkpointing import set_checkpointing
from lycotool.training.data.dataset import Dataset
from lycotool.training.data.latents import LatentCache, cache_latents
from lycotool.training.data.texts import TextCache
from lycotool.training.diffusion import Diffusion
from lycotool.training.inputs import InputMaker
from lycotool.training.kernels.install import are_for, fault, install
from lycotool.training.loop import Run
from lycotool.training.loss_scale import LossScale
from lycotool.training.observe import Observer
from lycotool.training.optimizers.fused_stepper import FusedStepper
from lycotool.training.optimizers.sharded_stepper import ShardedStepper
from lycotool.training.optimizers.stepper import Group, Stepper
from lycotool.training.options import ScheduleOptions, TrainOptions
from lycotool.training.prompts import read_prompts
from lycotool.training.recorder import Recorder
from lycotool.training.samples import ImageMaker
from lycotool.training.schedules import Schedule, steps_of
from lycotool.training.setup import Trainable, captions_of
from lycotool.training.validation import Validation

#: Steps between two looks at the losses on a device that one waits for.
_LOOK_EVERY = 10

#: Encoded captions held in memory at most.
_TEXT_BYTES = 2 * 2**30


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
    if options.optimizer.fused_backward and ready.world.size > 1:
        raise UsageError("--fused-backward is for one GPU: several add up all gradients together")
    stepper = _stepper(ready)
    if options.compute.base_dtype is not None or is_away(
        base, base.unet
    ):  # memory is scarce: one after another
        send_away(base, base.unet, *base.text_encoders)
    latents = latents_of(options, base, ready.dataset, observer, ready.world)
    held_out = ready.dataset.validation
    validated = None if held_out is None else latents_of(options, base, held_out, observer, ready.world)
    if not ready.keeps_vae:
        send_away(base, base.vae)
    texts = None if any(component != "unet" for component in ready.lrs) else texts_of(options, base)
    inputs = input_maker(ready, ready.dataset, latents, texts)
    if texts is not None:
        _fill_texts(ready, inputs, texts, observer)
    if ready.keeps_text:
        bring(base, *base.text_encoders)
    else:
        send_away(base, *base.text_encoders)
    bring(base, base.unet)
    set_checkpointing(base, ready.lrs, enabled=bool(options.compute.gradient_checkpointing))
    if base.device.type == "cuda":
        base.unet.to(memory_format=torch.channels_last)
    if options.compute.triton and are_for(base.device, base.unet_dtype):
        why_not = fault(base.device, base.unet_dtype)
        if why_not is None:
            install(base.unet)
            network.use_kernels()
        else:
            observer.note(f"Triton does not work here, so torch's slower kernels are used: {why_not}")
    network.train()
    every = options.log.log_every or (_LOOK_EVERY if base.device.type == "cuda" else 1)
    return Run(
        world=ready.world,
        base=base,
        network=network,
        plan=ready.plan,
        inputs=inputs,
        validation_latents=validated,
        diffusion=diffusion,
        stepper=stepper,
        schedule=schedule,
        scale=LossScale(enabled=options.compute.precision == "fp16", device=base.device),
        recorder=Recorder(base.device, every),
        clip_skip=options.model.clip_skip,
        max_grad_norm=options.optimizer.max_grad_norm,
        scale_weight_norms=options.optimizer.scale_weight_norms,
        captured=options.compute.cuda_graphs
        and base.device.type == "cuda"
        and not options.optimizer.fused_backward,
    )


def _stepper(ready: Trainable) -> Stepper:
    options = ready.options.optimizer
    groups, name, arguments = groups_of(ready), options.optimizer, options.optimizer_arg
    if options.fused_backward:
        return FusedStepper(groups, name, arguments)
    if ready.options.compute.shard_optimizer:
        return ShardedStepper(groups, name, arguments, ready.world)
    return Stepper(groups, name, arguments)


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
        rank=ready.world.rank,
        ranks=ready.world.size,
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


def make_validation(ready: Trainable, run: Run) -> Validation | None:
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
    assert run.validation_latents is not None
    inputs = input_maker(ready, dataset, run.validation_latents, run.inputs.texts)
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


def latents_of(
    options: TrainOptions, base: BaseModel, dataset: Dataset, observer: Observer, world: World | None = None
) -> LatentCache:
    """Encode the images, each in one of the processes, or get ready to."""
    world = world or World(0, 1, base.device)
    where = options.data.cache_latents
    folder = _cache_folder(options) if where == "disk" else None
    key = base.vae_fingerprint if where == "disk" else ""
    if where != "none":
        observer.start("encoding images", len(dataset.examples[world.rank :: world.size]))
    cache = cache_latents(
        dataset,
        lambda pixels: encode_images(base, pixels),
        key=key,
        where=where,
        folder=folder,
        rank=world.rank,
        ranks=world.size,
        gather=world.gather,
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
    captions = captions_of(ready.plan, epoch=0)
    world = ready.world
    observer.start("encoding captions", len(captions) // world.size)
    texts.fill(
        inputs.token_ids(sorted(captions)),
        rank=world.rank,
        ranks=world.size,
        gather=world.gather,
        advance=observer.advance,
    )


def _cache_folder(options: TrainOptions) -> Path:
    if options.data.cache_dir is not None:
        return Path(options.data.cache_dir)
    source = Path(options.dataset)
    return (source if source.is_dir() else source.parent) / ".lycotool-cache"
