"""``lycotool convert``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._output import Output, human_bytes
from lycotool.cli._report import finish

if TYPE_CHECKING:
    from lycotool.ops.convert import ConvertResult

EPILOG = """Examples:

lycotool convert style.safetensors --to diffusers

lycotool convert loha.safetensors --to networks.lora --algo lora -o plain.safetensors"""

#: The names of :data:`lycotool.formats.dialects.DIALECTS`; a test keeps them equal.
FORMATS = Literal[
    "networks.lora", "lycoris.kohya", "locon.locon_kohya", "lycoris", "diffusers", "diffusers-legacy", "peft",
    "comfyui", "onetrainer", "ai-toolkit", "bfl", "hcp", "kohya-oft",
]  # fmt: skip

#: The names of :data:`lycotool.models.families.FAMILIES`, likewise.
FAMILIES = Literal[
    "sdxl", "sd1", "sd2", "chroma", "flux2", "flux1", "hunyuan-video-1.5", "hunyuan-image", "hunyuan-video",
    "sd3", "qwen-image", "z-image", "lumina2", "anima", "wan",
]  # fmt: skip

_FORMAT, _ALGORITHM = "Format", "Algorithm"


@reported
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter; `-` is standard input.")],
    to: Annotated[
        FORMATS,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help=f"Whose format to write: {', '.join(get_args(FORMATS))}.",
            rich_help_panel=_FORMAT,
        ),
    ],
    from_: Annotated[
        FORMATS | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="Whose format the file is in, by the same names.",
            show_default="found out",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    arch: Annotated[
        FAMILIES | None,
        typer.Option(
            "--arch",
            metavar="MODEL",
            help=f"The model it is for: {', '.join(get_args(FAMILIES))}.",
            show_default="found out",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    drop: Annotated[
        bool,
        typer.Option("--drop", help="Leave out what the format cannot hold.", rich_help_panel=_FORMAT),
    ] = False,
    algo: Annotated[
        Literal["keep", "lora", "full"],
        typer.Option(
            "--algo",
            help="Also change the algorithm: exactly, else with --rank or --error.",
            rich_help_panel=_ALGORITHM,
        ),
    ] = "keep",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="N",
            help="Rank of what has no exact LoRA form.",
            rich_help_panel=_ALGORITHM,
            show_default="none",
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            "--error",
            metavar="0..1",
            help="Or its relative error, by module.",
            rich_help_panel=_ALGORITHM,
            show_default="none",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="CKPT",
            help="Checkpoint for algorithms whose change depends on it.",
            rich_help_panel=_ALGORITHM,
            show_default="none",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the change of every module with the written file's.",
            show_default="where tensors change",
            rich_help_panel="Reports",
        ),
    ] = None,
    output: opt.OutputOption = None,
    force: opt.ForceOption = False,
    dtype: opt.DtypeOption = "keep",
    allow_pickle: opt.PickleOption = False,
    strict: opt.StrictOption = False,
    dry_run: opt.DryRunOption = False,
    json_output: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    modules: Annotated[
        bool, typer.Option("--modules", help="Report every module.", rich_help_panel="Reports")
    ] = False,
    alpha_zero: opt.AlphaZeroOption = "zero",
    dylora_block_size: opt.DyloraBlockOption = 1,
    legacy_loha_cp: opt.LohaCpOption = False,
    glora_old_scale: opt.GloraScaleOption = "twice",
) -> None:
    """Write an adapter in another program's format, and verify it.

    Fused matrices are split and split ones fused where the naming asks for it, exactly. What
    the format cannot hold is an error that names every module. Prints the path that was written.
    """
    from lycotool.ops.convert import ConvertOptions
    from lycotool.ops.convert import convert as run

    out = Output(json=json_output, quiet=quiet)
    options = ConvertOptions(
        output=output,
        force=force,
        dtype=dtype,
        strict=strict,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
        reading=opt.reading(alpha_zero, "linear", dylora_block_size, legacy_loha_cp, glora_old_scale),
        to=to,
        from_=from_,
        arch=arch,
        algo=algo,
        rank=rank,
        error=error,
        base=base,
        drop=drop,
        verify=verify,
    )
    with out.progress() as bar:
        result = run(adapter, options, progress=bar)
    _show(out, result, modules=modules)


def _show(out: Output, result: ConvertResult, *, modules: bool) -> None:
    out.warnings(result.warnings)
    for name, reason in result.dropped.items():
        out.warnings([f"{name}: dropped: {reason}"])
    if modules:
        for m in result.modules:
            change = f", {m.change}" if m.change else ""
            out.note(f"{m.name}: {m.type}{change}, from {', '.join(m.sources)}")
    changes: dict[str, int] = {}
    for m in result.modules:
        if m.change:
            changes[m.change] = changes.get(m.change, 0) + 1
    done = "".join(f", {count} {change}" for change, count in changes.items())
    out.note(f"{result.family}: {len(result.modules)} modules{done}")
    if result.largest_difference is not None:
        out.note(
            f"verified: no change of a weight differs by more than {result.largest_difference:.2g} of itself"
        )
    verb = "would write" if result.dry_run else "wrote"
    out.note(f"{verb} {human_bytes(result.nbytes)} for {result.to}")
    finish(out, dataclasses.asdict(result), [result.output], dry_run=result.dry_run)
