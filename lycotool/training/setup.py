"""From options to a base model with its network attached, and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.devices import resolve_device
from lycotool.distributed import World
from lycotool.errors import UsageError
from lycotool.io.nearest import nearest_file
from lycotool.lazy import torch
from lycotool.training.bases.eight_bit import BaseDtype, hold_in_eight_bits
from lycotool.training.bases.load import load_base
from lycotool.training.bases.model import BaseModel
from lycotool.training.data.batches import plan_epoch
from lycotool.training.data.captions import caption_of
from lycotool.training.data.dataset import Dataset
from lycotool.training.data.reading import read_dataset
from lycotool.training.memory.available import available_memory
from lycotool.training.network import Network
from lycotool.training.network_options import trainable
from lycotool.training.optimizers.sharded_stepper import can_shard
from lycotool.training.options import TrainOptions
from lycotool.training.plan import Plan
from lycotool.training.presets import Preset, read_preset
from lycotool.training.targets import Target, find_targets

if TYPE_CHECKING:
    from lycotool.training.weights import Loaded
from lycotool.training.checks import check_options

Precision = Literal["bf16", "fp16", "fp32"]

#: Trained numbers from which on sharding the optimizer saves gigabytes; adapters are far below.
_SHARDED_FROM = 2**28

#: What a VAE is allowed for images of 1024² and more, where it is weighed whether all models fit.
_ENCODING_BYTES = 6 * 2**30


@dataclass(frozen=True, slots=True)
class Trainable:
    """A base model with its network attached, and the data: all a dry run needs.

    Attributes
    ----------
    options
        With everything decided that was left to the model.
    lrs
        Learning rate by component.
    device
        Where it will be trained; the models are there, or on their way.
    keeps_text, keeps_vae
        Whether text encoders and VAE are at work while training, because they are trained, or
        their inputs change from step to step.
    world
        The processes that train together.
    notes
        What was done to the base.
    """

    options: TrainOptions
    base: BaseModel
    dataset: Dataset
    network: Network
    plan: Plan
    lrs: Mapping[str, float]
    device: torch.device
    keeps_text: bool
    keeps_vae: bool
    world: World
    notes: tuple[str, ...] = ()


def prepare(
    options: TrainOptions,
    *,
    load_weights: Callable[[str], Mapping[str, Loaded]],
    base: BaseModel | None = None,
    weightless: bool = False,
    world: World | None = None,
) -> Trainable:
    """Read the base and the data, and attach the network.

    Parameters
    ----------
    load_weights
        Reads the file of ``network_weights``.
    base
        A model in memory instead of ``options.base``.
    weightless
        Read no weights of the base: enough to plan and to count.
    world
        The processes that train together, which has decided the device; None for this one alone.

    Raises
    ------
    LycotoolError
        As the parts say.
    """
    if not Path(options.dataset).exists():
        raise UsageError("no such file or folder", path=options.dataset, hint=nearest_file(options.dataset))
    preset = read_preset(options.network.preset)
    optimizer = check_options(options)
    world = world or World(0, 1, resolve_device(options.compute.device))
    _check_sharding(options, world)
    device = world.device
    precision = _precision(options.compute.precision, device)
    options = replace(options, compute=replace(options.compute, precision=precision))
    if base is None:
        base = load_base(
            options.base,
            prediction=options.model.prediction,
            unet_dtype=_dtype(precision),
            te_dtype=_dtype(precision),
            vae_dtype=_dtype(options.compute.vae_precision),
            device="meta" if weightless else device,
            vae=options.model.vae,
            unet_device=partial(_place_of_unet, options, device),
        )
    else:
        device = base.device
    options = replace(options, data=options.data.for_family(base.family, base.prediction))
    dataset = read_dataset(options.dataset, options.data)
    lrs = learning_rates(options, base, optimizer.lr)
    targets = [target for target in _targets(options, base, preset, lrs) if target.component in lrs]
    plan = Plan(dataset, options.length, ranks=world.size)
    keeps_text = any(target.component != "unet" for target in targets) or _text_changes(options, plan)
    notes = _in_eight_bits(base, options.compute.base_dtype, texts=keeps_text)
    weights = options.network.network_weights
    network = Network.build(
        targets,
        options.network,
        seed=options.length.seed,
        weights=None if weights is None else load_weights(weights),
    )
    network.to(base.device)
    network.compute_on(device)
    network.part = world.rank
    shards = _shards(options, world, network)
    if shards and options.compute.shard_optimizer is None:
        notes = (*notes, f"the optimizer is sharded over {world.size} processes")
    options = replace(options, compute=replace(options.compute, shard_optimizer=shards))
    used = set(network.components)
    lrs = {component: lr for component, lr in lrs.items() if component in used}
    return Trainable(
        options,
        base,
        dataset,
        network,
        plan,
        lrs,
        device,
        keeps_text=keeps_text,
        keeps_vae=options.data.cache_latents == "none" or any(s.options.random_crop for s in dataset.subsets),
        world=world,
        notes=notes,
    )


def _in_eight_bits(base: BaseModel, kind: BaseDtype | None, *, texts: bool) -> tuple[str, ...]:
    """Hold the weights that stay on the device while training in 8 bits, and say what that does."""
    if kind is None:
        return ()
    networks = {"UNet": base.unet}
    if texts:
        networks |= {f"text encoder {number}": model for number, model in enumerate(base.text_encoders, 1)}
    return tuple(
        hold_in_eight_bits(network, kind, base.device).describe(name, kind)
        for name, network in networks.items()
    )


def _check_sharding(options: TrainOptions, world: World) -> None:
    if not options.compute.shard_optimizer:
        return
    if world.size == 1:
        raise UsageError("--shard-optimizer is for several processes", hint="`--gpus N`")
    name = options.optimizer.optimizer
    if not can_shard(name):
        raise UsageError(
            f"--shard-optimizer: a step of {name} needs all parameters together",
            hint="`--optimizer adamw`, lion or sgd",
        )


def _shards(options: TrainOptions, world: World, network: Network) -> bool:
    """Whether each process keeps the optimizer's state for a part of the parameters."""
    asked = options.compute.shard_optimizer
    if asked is not None or world.size == 1 or not can_shard(options.optimizer.optimizer):
        return bool(asked)
    return sum(parameter.numel() for parameter in network.parameters()) >= _SHARDED_FROM


def _place_of_unet(options: TrainOptions, device: torch.device, weights: int) -> torch.device:
    """Where to read a UNet to: the device, if it can also hold what is at work before training.

    One that is to be held in 8 bits is read to the machine's memory, and goes on from there layer by layer.
    """
    available = available_memory(device)
    if available is None:
        return device
    is_roomy = available >= 2 * weights + _ENCODING_BYTES and options.compute.base_dtype is None
    return device if is_roomy else torch.device("cpu")


def _text_changes(options: TrainOptions, plan: Plan) -> bool:
    """Whether text encoders meet new captions after the first epoch, or keep nothing."""
    if options.data.cache_text == "none":
        return True
    return plan.epochs > 1 and not captions_of(plan, epoch=1) <= captions_of(plan, epoch=0)


def captions_of(plan: Plan, *, epoch: int) -> set[str]:
    """Every caption of an epoch, as it is trained."""
    return {
        caption_of(
            plan.dataset, sample, seed=plan.seed, epoch=epoch, step=epoch and plan.steps - 1,
            total_steps=plan.steps,
        )
        for batch in plan_epoch(plan.dataset, seed=plan.seed, epoch=epoch)
        for sample in batch.samples
    }  # fmt: skip


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
    if evidence.is_assumed:
        found.append(
            f"the model is taken to predict {evidence.prediction}: {evidence.evidence} (`--prediction` would)"
        )
    return found
