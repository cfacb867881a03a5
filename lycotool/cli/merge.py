"""``lycotool merge``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._output import Output
from lycotool.cli._report import show_adapter_merge, show_bake

EPILOG = """Examples:

lycotool merge model.safetensors style.safetensors:0.8 character.safetensors

lycotool merge a.safetensors:0.6 b.safetensors:0.4:te=0 -o ab.safetensors"""


@reported
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint, or an adapter (`FILE:W`).")],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER[:W]...]", help="Adapters, each with its strength."),
    ] = None,
    output: opt.OutputOption = None,
    force: opt.ForceOption = False,
    dtype: opt.DtypeOption = "keep",
    metadata: Annotated[
        Literal["first", "union", "none"],
        typer.Option("--metadata", help="Whose metadata an adapter merge keeps.", rich_help_panel="Output"),
    ] = "first",
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Merge what the rules refuse, by rebuilding the weight change.",
            rich_help_panel="Computing",
        ),
    ] = False,
    base_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="CKPT",
            rich_help_panel="Computing",
            help="Checkpoint for algorithms whose change depends on it.",
        ),
    ] = None,
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
    """Merge adapters into a checkpoint, or adapters into one adapter.

    The result is exact: W + Σ w·ΔW for a checkpoint, one adapter equal to Σ w·ΔW for
    adapters. Algorithms the registry's rules refuse end with exit code 9; `--rebuild`
    overrides. Prints the path that was written.
    """
    from lycotool.ops.bake import BakeResult
    from lycotool.ops.merge import MergeOptions
    from lycotool.ops.merge import merge as run

    out = Output(json=json_output, quiet=quiet)
    options = MergeOptions(
        output=output,
        force=force,
        dtype=dtype,
        device=device,
        strict=strict,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
        reading=opt.reading(alpha_zero, dora_strength, dylora_block_size, legacy_loha_cp, glora_old_scale),
        strengths=opt.strengths(te, unet, lbw, lbw_rule),
        rebuild=rebuild,
        base=base_checkpoint,
        metadata=metadata,
    )
    with out.progress() as bar:
        result = run(opt.weighted(base), [opt.weighted(a) for a in adapters or ()], options, progress=bar)
    if isinstance(result, BakeResult):
        show_bake(out, result)
    else:
        show_adapter_merge(out, result)
