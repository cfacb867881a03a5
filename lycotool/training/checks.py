"""Options that can be seen to be wrong before any model is read."""

from __future__ import annotations

from lycotool.errors import UsageError
from lycotool.training.diffusion import check_noise
from lycotool.training.optimizers import known
from lycotool.training.optimizers.arguments import accepted_by, read_arguments
from lycotool.training.options import ScheduleOptions, TrainOptions
from lycotool.training.schedules import check_rules


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
    if rates.fused_backward:
        check_fused_backward(options)
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


def check_fused_backward(options: TrainOptions) -> None:
    """Refuse what needs all gradients at once.

    Raises
    ------
    UsageError
        Naming the option.
    """
    needs = {
        "--max-grad-norm": (options.optimizer.max_grad_norm > 0, "`--max-grad-norm 0`"),
        "--gradient-accumulation-steps": (
            options.length.gradient_accumulation_steps > 1,
            "a larger `--batch-size`",
        ),
        "--precision fp16": (options.compute.precision == "fp16", "`--precision bf16`"),
        "prodigy": (options.optimizer.optimizer.lower() == "prodigy", "another `--optimizer`"),
    }
    for name, (is_asked, way) in needs.items():
        if is_asked:
            raise UsageError(
                f"{name} needs all gradients together, --fused-backward never has them", hint=way
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
