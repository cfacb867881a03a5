"""Options that several commands share, worded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lycotool.errors import UsageError

if TYPE_CHECKING:  # the registry is not needed for --help and completion
    from lycotool.algorithms.base import Reading
    from lycotool.ops._adapter import AdapterInput
    from lycotool.ops._strengths import StrengthOptions

_OUTPUT, _REPORT, _COMPUTE, _READING = "Output", "Reports", "Computing", "Contested readings"
_STRENGTH = "Strengths"

DTYPES = Literal["keep", "fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"]

OutputOption = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="PATH", help="Where to write; `-` is standard output.",
                 rich_help_panel=_OUTPUT, show_default="a name in the current folder"),
]  # fmt: skip
ForceOption = Annotated[
    bool, typer.Option("-f", "--force", help="Replace an existing output.", rich_help_panel=_OUTPUT)
]
DtypeOption = Annotated[
    DTYPES,
    typer.Option(
        "--dtype", help="Saved dtype; keep is the input's, tensor by tensor.", rich_help_panel=_OUTPUT
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("-n", "--dry-run", help="Plan and report, write nothing.", rich_help_panel=_OUTPUT),
]
StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="Make warnings errors (exit code 5), before anything is written.",
                 rich_help_panel=_REPORT),
]  # fmt: skip
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda[:N]|mps",
                 help="Where to compute; auto is cuda, then mps, then cpu.", rich_help_panel=_COMPUTE),
]  # fmt: skip
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_REPORT),
]
QuietOption = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Nothing on stderr but errors.", rich_help_panel=_REPORT),
]
PickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .pt, .ckpt and .bin files too (plain tensors only).",
                 rich_help_panel=_COMPUTE),
]  # fmt: skip
ShardSizeOption = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", rich_help_panel=_OUTPUT, show_default="one file, or as the folder has",
                 help="Write a checkpoint as files of at most this size and an index: 5GB (decimal) or 5GiB (binary)."),
]  # fmt: skip
VaeOption = Annotated[
    str | None,
    typer.Option("--vae", metavar="VAE", rich_help_panel=_COMPUTE, show_default="the checkpoint's",
                 help="Replace the checkpoint's VAE by this file's or folder's, in LDM or diffusers names."),
]  # fmt: skip
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", rich_help_panel=_OUTPUT,
                 help="Read the output before it gets its name and compare it with float64; a difference is exit code 10."),
]  # fmt: skip
TeOption = Annotated[
    float,
    typer.Option("--te", metavar="W", help="Factor for text encoders; one adapter's own: `FILE:0.7:te=0.5`.",
                 rich_help_panel=_STRENGTH),
]  # fmt: skip
UnetOption = Annotated[
    float,
    typer.Option("--unet", metavar="W", help="Factor for the UNet or transformer; its own: `FILE:unet=0.5`.",
                 rich_help_panel=_STRENGTH),
]  # fmt: skip
LbwOption = Annotated[
    str | None,
    typer.Option("--lbw", metavar="LIST|PRESET|FILE", show_default="1 for each block",
                 help="Factors by block: 17 or 26 numbers for SD 1 and 2, 12 or 20 for SDXL, 61 for Flux, or a "
                 "named list such as MIDD, or FILE#NAME; its own: `FILE:lbw=MIDD`.", rich_help_panel=_STRENGTH),
]  # fmt: skip
LbwRuleOption = Annotated[
    list[str] | None,
    typer.Option("--lbw-rule", metavar="BLOCKS:LAYERS:W", show_default="none", rich_help_panel=_STRENGTH,
                 help="Factor for layers of some blocks, such as `IN05-OUT05:attn:0.5`; later rules win."),
]  # fmt: skip
AlphaZeroOption = Annotated[
    Literal["zero", "rank"],
    typer.Option("--alpha-zero", help="What a stored alpha of 0 means: no change, or alpha = rank.",
                 rich_help_panel=_READING),
]  # fmt: skip
DoraStrengthOption = Annotated[
    Literal["linear", "lycoris", "peft"],
    typer.Option("--dora-strength", help="How DoRA follows a strength other than 1: linear scales its change; lycoris scales only the "
                 "norm, peft inside the norm.",
                 rich_help_panel=_READING),
]  # fmt: skip
DyloraBlockOption = Annotated[
    int,
    typer.Option("--dylora-block-size", min=1, rich_help_panel=_READING,
                 help="Block size, in ranks, that a LyCORIS DyLoRA was trained with; its scale is alpha·block/rank."),
]  # fmt: skip
LohaCpOption = Annotated[
    bool,
    typer.Option("--legacy-loha-cp", rich_help_panel=_READING,
                 help="LoHa with cores trained before LyCORIS 2.0.0: hada_t1 serves both factors."),
]  # fmt: skip
GloraScaleOption = Annotated[
    Literal["once", "twice"],
    typer.Option("--glora-old-scale", rich_help_panel=_READING,
                 help="Scale of old-layout GLoRA: twice as it was trained, once as samplers read it."),
]  # fmt: skip


def reading(
    alpha_zero: Literal["zero", "rank"],
    dora_strength: Literal["linear", "lycoris", "peft"],
    dylora_block_size: int,
    legacy_loha_cp: bool,
    glora_old_scale: Literal["once", "twice"],
) -> Reading:
    """The contested readings as one value."""
    from lycotool.algorithms.base import Reading

    return Reading(
        alpha_zero=alpha_zero,
        dora_strength=dora_strength,
        dylora_block_size=dylora_block_size,
        loha_cp_shared_core=legacy_loha_cp,
        glora_old_scale=glora_old_scale,
    )


def shard_bytes(text: str | None) -> int | None:
    """``--shard-size`` in bytes.

    Raises
    ------
    UsageError
        If it is no size, or so few bytes that a unit is missing.
    """
    from lycotool.ops._sizes import parse_size

    if text is None:
        return None
    size = parse_size(text)
    if text.strip().isdigit() and size < 1000:
        raise UsageError(
            f"--shard-size {text} is {text} bytes", hint=f"did you mean {text}GB? `{text}B` is bytes"
        )
    return size


def weighted(text: str, *, methods: bool = False) -> AdapterInput:
    """An adapter with its strength and factors, as :func:`lycotool.ops._inputs.parse_input` reads it."""
    from lycotool.ops._inputs import parse_input

    return parse_input(text, methods=methods)


def strengths(te: float, unet: float, lbw: str | None, lbw_rules: list[str] | None) -> StrengthOptions:
    """The factors for every adapter as one value."""
    from lycotool.ops._strengths import StrengthOptions

    return StrengthOptions(te, unet, lbw, tuple(lbw_rules or ()))
