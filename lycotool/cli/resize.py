"""``lycotool resize``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._output import Output, human_bytes
from lycotool.cli._report import finish
from lycotool.ops._sizes import parse_size

if TYPE_CHECKING:
    from lycotool.ops.resize import ResizeResult

EPILOG = """Examples:

lycotool resize style.safetensors --rank 8 --conv-rank 4

lycotool resize loha.safetensors --to lora --method sv_fro --param 0.99 --rank 64"""

_PANEL = "Ranks"

METHODS = Literal[
    "fixed",
    "threshold",
    "sv_ratio",
    "sv_cumulative",
    "sv_fro",
    "sv_knee",
    "sv_cumulative_knee",
    "sv_rel_decrease",
]


@reported
def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter, a PEFT folder or `-`.")],
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="N",
            help="New rank; with another method than fixed, the most it may choose.",
            rich_help_panel=_PANEL,
            show_default="none",
        ),
    ] = None,
    conv_rank: Annotated[
        int | None,
        typer.Option(
            "--conv-rank",
            metavar="N",
            rich_help_panel=_PANEL,
            help="Rank of kernels larger than 1.",
            show_default="--rank",
        ),
    ] = None,
    method: Annotated[
        METHODS,
        typer.Option(
            "--method",
            metavar="METHOD",
            rich_help_panel=_PANEL,
            help="How each module's rank is chosen from its singular values. fixed: `--rank`. threshold: those above "
            "--param. sv_ratio: those of at least the largest over --param. sv_cumulative, sv_fro: until they hold the share --param of "
            "the sum, or of the Frobenius norm. sv_knee, sv_cumulative_knee: at the bend of the curve. "
            "sv_rel_decrease: until one falls below --param of the one before.",
        ),
    ] = "fixed",
    param: Annotated[
        float | None,
        typer.Option(
            "--param",
            metavar="X",
            help="The method's number: sv_ratio a ratio of at least 1, threshold a singular value, the others a share from 0 to 1.",
            rich_help_panel=_PANEL,
            show_default="none",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            rich_help_panel=_PANEL,
            show_default="none",
            help="Largest size of the file, 32MB (decimal) or 30MiB (binary); ranks are spread where they save most.",
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            "--error",
            metavar="0..1",
            rich_help_panel=_PANEL,
            show_default="none",
            help="Relative error of the whole file; ranks as small as it allows.",
        ),
    ] = None,
    to: Annotated[
        Literal["keep", "lora"],
        typer.Option("--to", help="Convert LoHa and LoKr exactly to LoRA first.", rich_help_panel=_PANEL),
    ] = "keep",
    keep_refused: Annotated[
        bool,
        typer.Option(
            "--keep-refused",
            rich_help_panel=_PANEL,
            help="Carry modules that the rules refuse over unchanged.",
        ),
    ] = False,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            rich_help_panel=_PANEL,
            help="Slice a DyLoRA into one file per multiple of `--unit`, in the folder `-o`, which is made if there is none.",
        ),
    ] = False,
    unit: Annotated[
        int | None,
        typer.Option(
            "--unit",
            metavar="N",
            help="The DyLoRA's unit (block size), in ranks.",
            rich_help_panel=_PANEL,
            show_default="none",
        ),
    ] = None,
    compat: Annotated[
        Literal["none", "kohya"],
        typer.Option(
            "--compat", help="kohya: the ranks sd-scripts picks, one too many.", rich_help_panel=_PANEL
        ),
    ] = "none",
    output: opt.OutputOption = None,
    force: opt.ForceOption = False,
    dtype: opt.DtypeOption = "keep",
    device: opt.DeviceOption = "auto",
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
) -> None:
    """Shrink an adapter's ranks, losing as little as that rank allows.

    LoRA, LoCon, DyLoRA, and with `--to lora` LoHa and LoKr. The result is the best of its
    ranks, computed from the factors. Modules without a rank are carried over. Prints the
    path that was written.
    """
    from lycotool.ops.resize import ResizeOptions
    from lycotool.ops.resize import resize as run

    out = Output(json=json_output, quiet=quiet)
    options = ResizeOptions(
        output=output,
        force=force,
        dtype=dtype,
        device=device,
        strict=strict,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
        reading=opt.reading(alpha_zero, "linear", dylora_block_size, legacy_loha_cp, "twice"),
        rank=rank,
        conv_rank=conv_rank,
        method=method,
        parameter=param,
        size=None if size is None else parse_size(size),
        error=error,
        to=to,
        keep_refused=keep_refused,
        split=split,
        unit=unit,
        compat=compat,
    )
    with out.progress() as bar:
        result = run(adapter, options, progress=bar)
    _show(out, result, modules=modules)


def _show(out: Output, result: ResizeResult, *, modules: bool) -> None:
    out.warnings(result.warnings)
    if modules:
        for m in result.modules:
            out.note(
                f"{m.name}: {m.type}: rank {m.old_rank} -> {m.new_rank}, kept {m.kept_fro:.2%} of the norm, "
                f"{m.kept_sum:.2%} of the sum, max ratio {'-' if m.max_ratio is None else f'{m.max_ratio:.4g}'}"
            )
    ranks = ", ".join(f"{rank}: {count}" for rank, count in result.ranks.items())
    carried = "".join(f", {count} {label} carried over" for label, count in result.carried.items())
    out.note(f"modules by rank {ranks}{carried}")
    out.note(
        f"relative error {result.relative_error:.3%}; {human_bytes(result.bytes_before)} -> "
        f"{human_bytes(result.bytes_after)}"
    )
    finish(out, dataclasses.asdict(result), result.outputs, dry_run=result.dry_run)
