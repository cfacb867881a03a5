"""``lycotool extract``."""

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
    from lycotool.ops.extract import ExtractResult

EPILOG = """Examples:

lycotool extract base.safetensors tuned.safetensors --rank 32 --conv-rank 16

lycotool extract base/ tuned.safetensors --mode fro --param 0.95 --rank 128 -o style.safetensors"""

_RANKS, _WHAT = "Ranks", "What is extracted"

MODES = Literal["fixed", "threshold", "ratio", "quantile", "fro", "full", "size", "error"]


@reported
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint before.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The checkpoint after.")],
    algo: Annotated[
        Literal["lora", "lokr", "full", "dora", "ia3"],
        typer.Option(
            "--algo", help="What the difference becomes: full keeps all of it.", rich_help_panel=_WHAT
        ),
    ] = "lora",
    mode: Annotated[
        MODES,
        typer.Option(
            "--mode",
            metavar="MODE",
            rich_help_panel=_RANKS,
            help="How each layer's rank is chosen from its singular values. fixed: `--rank`. threshold: those above "
            "--param. ratio: those above --param of the largest. quantile: until they hold the share --param of the "
            "sum. fro: of the Frobenius norm. full: all. size, error: `--size` or `--error` of the whole file.",
        ),
    ] = "fixed",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="N",
            help="Rank of mode fixed, cap of the others.",
            rich_help_panel=_RANKS,
            show_default="32 in mode fixed",
        ),
    ] = None,
    conv_rank: Annotated[
        int | None,
        typer.Option(
            "--conv-rank",
            metavar="N",
            help="Rank of kernels larger than 1.",
            rich_help_panel=_RANKS,
            show_default="--rank",
        ),
    ] = None,
    param: Annotated[
        float | None,
        typer.Option(
            "--param",
            metavar="X",
            help="The mode's number: a singular value for threshold, else a share from 0 to 1.",
            rich_help_panel=_RANKS,
            show_default="none",
        ),
    ] = None,
    conv_param: Annotated[
        float | None,
        typer.Option(
            "--conv-param",
            metavar="X",
            help="The mode's number for kernels larger than 1.",
            rich_help_panel=_RANKS,
            show_default="--param",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Largest file of mode size, 64MB (decimal) or 60MiB (binary).",
            rich_help_panel=_RANKS,
            show_default="none",
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            "--error",
            metavar="0..1",
            help="Relative error of the whole file, of mode error.",
            rich_help_panel=_RANKS,
            show_default="none",
        ),
    ] = None,
    use_conv_cp: Annotated[
        bool,
        typer.Option("--use-conv-cp", help="Convolutions with a CP (Tucker) core.", rich_help_panel=_WHAT),
    ] = False,
    sparse_bias: Annotated[
        bool,
        typer.Option(
            "--sparse-bias",
            help="Also keep the largest entries that the factors leave.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    sparsity: Annotated[
        float,
        typer.Option(
            "--sparsity",
            metavar="0..1",
            help="Share of entries the sparse part leaves out.",
            rich_help_panel=_WHAT,
        ),
    ] = 0.98,
    factor: Annotated[
        int,
        typer.Option(
            "--factor", metavar="N", help="LoKr's factor; -1 splits most equally.", rich_help_panel=_WHAT
        ),
    ] = -1,
    dora_axis: Annotated[
        Literal["out", "in"],
        typer.Option("--dora-axis", help="Which axis DoRA keeps the norms of.", rich_help_panel=_WHAT),
    ] = "out",
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="GLOB",
            help="Only these layers, by adapter or checkpoint name; can be given several times.",
            rich_help_panel=_WHAT,
            show_default="all",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Not these layers; can be given several times.",
            rich_help_panel=_WHAT,
            show_default="none",
        ),
    ] = None,
    min_diff: Annotated[
        float,
        typer.Option(
            "--min-diff",
            metavar="X",
            help="Skip layers whose largest difference of an element is no more than this.",
            rich_help_panel=_WHAT,
        ),
    ] = 0.0,
    clamp_quantile: Annotated[
        float | None,
        typer.Option(
            "--clamp-quantile",
            metavar="0..1",
            rich_help_panel=_WHAT,
            help="Cut the factors at this quantile of their sizes, as older tools do at 0.99.",
            show_default="off",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="For the random start of the approximation.",
            rich_help_panel="Computing",
        ),
    ] = 0,
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
) -> None:
    """Write the difference of two checkpoints as an adapter.

    Every linear, convolution, norm, bias and embedding of the denoiser and the text encoders
    that differs is covered, layer by layer. Reports how much of the difference is captured.
    Prints the path that was written. Started several times by `torchrun`, as `torchrun
    --nproc-per-node 4 -m lycotool extract …`, the processes divide the layers among their GPUs.
    """
    from lycotool.distributed import launched
    from lycotool.ops.extract import ExtractOptions
    from lycotool.ops.extract import extract as run

    place = launched()
    is_main = place is None or place.rank == 0
    out = Output(json=json_output, quiet=quiet or not is_main)
    options = ExtractOptions(
        output=output,
        force=force,
        dtype=dtype,
        device=device,
        strict=strict,
        dry_run=dry_run,
        allow_pickle=allow_pickle,
        algo=algo,
        mode=mode,
        rank=rank,
        conv_rank=conv_rank,
        parameter=param,
        conv_parameter=conv_param,
        size=None if size is None else parse_size(size),
        error=error,
        use_conv_cp=use_conv_cp,
        sparse_bias=sparse_bias,
        sparsity=sparsity,
        factor=factor,
        dora_axis=dora_axis,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        min_diff=min_diff,
        clamp_quantile=clamp_quantile,
        seed=seed,
    )
    with out.progress() as bar:
        result = run(base, tuned, options, progress=bar)
    if is_main:
        _show(out, result, modules=modules)


def _show(out: Output, result: ExtractResult, *, modules: bool) -> None:
    out.warnings(result.warnings)
    if modules:
        for m in result.modules:
            rank = "" if m.rank is None else f" rank {m.rank},"
            out.note(f"{m.name}: {m.type},{rank} captured {m.captured:.2%} of {m.norm:.4g}")
    for reason, names in result.skipped.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        out.note(f"skipped, {reason}: {shown}")
    shares = ", ".join(f"{name} {share:.2%}" for name, share in result.captured.items())
    out.note(f"captured energy: {shares}; relative error {result.relative_error:.3%}")
    out.note(
        f"{'would write' if result.dry_run else 'wrote'} {len(result.modules)} modules, {human_bytes(result.nbytes)}"
    )
    finish(out, dataclasses.asdict(result), [result.output], dry_run=result.dry_run)
