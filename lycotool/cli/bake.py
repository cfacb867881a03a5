"""``lycotool bake``."""

from __future__ import annotations

from typing import Annotated

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._output import Output
from lycotool.cli._report import show_bake

EPILOG = """Examples:

lycotool bake model.safetensors oft.safetensors -o model-oft.safetensors

lycotool bake model/ style.safetensors:0.8 --dtype fp16 --dry-run

lycotool bake flux.safetensors.index.json style.safetensors --shard-size 5GB --verify

lycotool bake model.safetensors --vae vae-ft-mse.safetensors"""


@reported
def bake(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A .safetensors file, an index.json or a diffusers folder."
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER[:W]", help="Adapters, each with its strength."),
    ] = None,
    output: opt.OutputOption = None,
    force: opt.ForceOption = False,
    dtype: opt.DtypeOption = "keep",
    shard_size: opt.ShardSizeOption = None,
    vae: opt.VaeOption = None,
    verify: opt.VerifyOption = False,
    unbake: Annotated[
        bool,
        typer.Option(
            "--unbake", help="Take the adapters out again, and say how exactly.", rich_help_panel="Computing"
        ),
    ] = False,
    te: opt.TeOption = 1.0,
    unet: opt.UnetOption = 1.0,
    lbw: opt.LbwOption = None,
    lbw_rule: opt.LbwRuleOption = None,
    device: opt.DeviceOption = "auto",
    allow_pickle: opt.PickleOption = False,
    strict: opt.StrictOption = False,
    dry_run: opt.DryRunOption = False,
    json_output: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    alpha_zero: opt.AlphaZeroOption = "zero",
    dora_strength: opt.DoraStrengthOption = "linear",
    dylora_block_size: opt.DyloraBlockOption = 1,
    legacy_loha_cp: opt.LohaCpOption = False,
    glora_old_scale: opt.GloraScaleOption = "twice",
) -> None:
    """Fold adapters of any algorithm into a checkpoint.

    Every change refers to the original weights, is computed in float32 and rounded once.
    Tensors no adapter touches are copied byte for byte; float8 weights with scales beside them
    get new scales, and what that rounds off is reported. `-o NAME.safetensors.index.json` or
    `--shard-size` write a sharded checkpoint, a diffusers folder gives a folder. Prints the path
    that was written.
    """
    from lycotool.ops.bake import BakeOptions
    from lycotool.ops.bake import bake as run

    out = Output(json=json_output, quiet=quiet)
    options = BakeOptions(
        output=output,
        force=force,
        dtype=dtype,
        device=device,
        strict=strict,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
        reading=opt.reading(alpha_zero, dora_strength, dylora_block_size, legacy_loha_cp, glora_old_scale),
        unbake=unbake,
        shard_size=opt.shard_bytes(shard_size),
        vae=vae,
        verify=verify,
        strengths=opt.strengths(te, unet, lbw, lbw_rule),
    )
    with out.progress() as bar:
        result = run(checkpoint, [opt.weighted(a) for a in adapters or ()], options, progress=bar)
    show_bake(out, result)
