"""``lycotool inspect``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._inspect_edit import edit, edit_options, end_with, faults
from lycotool.cli._output import Output, json_text
from lycotool.errors import CheckError, IncompatibleError, LycotoolError, OutputError, UsageError

if TYPE_CHECKING:
    from lycotool.ops._common import Progress
    from lycotool.ops._inspect_overview import Overview
    from lycotool.ops.inspect import InspectOptions, InspectReport

EPILOG = """Examples:

lycotool inspect style.safetensors --stats --plot style.png

lycotool inspect loras/ --sort size --json | jq -r '.files[] | [.path, .architecture] | @tsv'

lycotool inspect style.safetensors --compare other.safetensors

lycotool inspect style.safetensors --set modelspec.author=me --strip-training-data"""

_SHOW, _MEASURE, _CHECK = "What to show", "Measuring (reads the tensors)", "Checking"
_FOLDERS, _EDIT = "Several files", "Editing metadata (writes a file, shows nothing else)"


@reported
def inspect(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files, folders, patterns of them, or `-`.")
    ],
    modules: Annotated[
        bool, typer.Option("--modules", help="Show every module.", rich_help_panel=_SHOW)
    ] = False,
    blocks: Annotated[
        bool,
        typer.Option(
            "--blocks",
            rich_help_panel=_SHOW,
            help="Count modules by block of the model; with `--stats` their strength too.",
        ),
    ] = False,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Show all metadata, decoded.", rich_help_panel=_SHOW)
    ] = False,
    tags: Annotated[
        bool,
        typer.Option(
            "--tags",
            help="Count the tags of the training captions, all data sets together.",
            rich_help_panel=_SHOW,
        ),
    ] = False,
    hashes: Annotated[
        bool,
        typer.Option(
            "--hashes", help="SHA-256, AutoV2 and AutoV3; reads the whole file.", rich_help_panel=_SHOW
        ),
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            min=0,
            rich_help_panel=_SHOW,
            help="Lines of long tables (tags, strongest modules, least alike layers); 0 shows all.",
            show_default="20",
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            rich_help_panel=_MEASURE,
            help="Strength of each module's change ΔW, its ranks by several measures, dead and non-finite modules.",
        ),
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="ADAPTER",
            rich_help_panel=_MEASURE,
            show_default="none",
            help="Put another adapter beside this one: cosine, norm ratio, overlap and interference by layer.",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            metavar="FILE.png|FILE.svg|-",
            rich_help_panel=_MEASURE,
            show_default="none",
            help="Draw what `--stats` or `--compare` measures; `-` is bars in the terminal.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="CKPT",
            rich_help_panel=_MEASURE,
            show_default="none",
            help="Checkpoint to measure against; DoRA, OFT, BOFT, GLoRA and (IA)³ need it.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="auto|cpu|cuda[:N]",
            rich_help_panel=_MEASURE,
            show_default="auto",
            help="Where to measure, in float64; auto is cuda, then cpu.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            rich_help_panel=_CHECK,
            help="Look for faults and oddities, reading everything; findings end with exit code 10.",
        ),
    ] = False,
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only",
            rich_help_panel=_CHECK,
            help="With `--check`: what names, shapes, alphas and metadata tell, without reading tensors.",
        ),
    ] = False,
    fail_on: Annotated[
        Literal["error", "warning", "info"] | None,
        typer.Option(
            "--fail-on",
            rich_help_panel=_CHECK,
            show_default="warning",
            help="The least finding that ends with exit code 10.",
        ),
    ] = None,
    sort: Annotated[
        Literal["name", "size", "rank", "modules", "algorithm", "arch", "strength", "findings"] | None,
        typer.Option(
            "--sort",
            rich_help_panel=_FOLDERS,
            show_default="as given",
            help="Order of several files; strength goes with `--stats`, findings with `--check`.",
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Largest or last first.", rich_help_panel=_FOLDERS)
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a metadata key; can be given several times.",
            rich_help_panel=_EDIT,
            show_default="none",
        ),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(
            "--unset",
            metavar="KEY",
            help="Take a metadata key out, or all that fit a pattern such as `ss_*`; can be given several times.",
            rich_help_panel=_EDIT,
            show_default="none",
        ),
    ] = None,
    strip_training_data: Annotated[
        bool,
        typer.Option(
            "--strip-training-data",
            rich_help_panel=_EDIT,
            help="Take out captions, folders, settings and times of training; keep what programs read.",
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="Where to write the edited file.",
            rich_help_panel=_EDIT,
            show_default="STEM-edited.safetensors",
        ),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Replace the file itself, whole or not at all.",
            rich_help_panel=_EDIT,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Replace an existing output.", rich_help_panel=_EDIT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Report the edit, write nothing.", rich_help_panel=_EDIT)
    ] = False,
    allow_pickle: opt.PickleOption = False,
    strict: opt.StrictOption = False,
    json_output: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    alpha_zero: opt.AlphaZeroOption = "zero",
    dora_strength: opt.DoraStrengthOption = "linear",
    dylora_block_size: opt.DyloraBlockOption = 1,
    legacy_loha_cp: opt.LohaCpOption = False,
    glora_old_scale: opt.GloraScaleOption = "twice",
) -> None:
    """Show what a file is and what can be done with it.

    Reads headers only, without `--hashes` and what measures or checks. Several files, or a folder,
    give one line per file; one that cannot be read is listed and decides the exit code.
    """
    from lycotool.ops.inspect import InspectOptions, expand
    from lycotool.ops.inspect import inspect as run

    out = Output(json=json_output, quiet=quiet)
    names = expand(files)
    if not names:
        raise UsageError(
            "no safetensors files in there",
            path=files[0],
            hint="other files are read where they are named: pickles with `--allow-pickle`",
        )
    editing = bool(set_ or unset or strip_training_data)
    measuring = stats or check or compare is not None or plot is not None
    _refuse_ignored(
        editing,
        [("-o", output), ("--in-place", in_place), ("--dry-run", dry_run)],
        "goes with `--set`, `--unset` or `--strip-training-data`",
    )
    _refuse_ignored(editing or plot is not None, [("--force", force)], "goes with an edit or `--plot`")
    if editing:
        shown = [("--modules", modules), ("--blocks", blocks), ("--metadata", metadata), ("--tags", tags),
                 ("--hashes", hashes), ("--stats", stats), ("--compare", compare), ("--plot", plot),
                 ("--check", check), ("--allow-pickle", allow_pickle), ("--strict", strict)]  # fmt: skip
        _refuse_ignored(False, shown, "shows a file, and editing metadata writes one")
        edit(names, edit_options(set_, unset, strip_training_data, output, in_place, force, dry_run), out)
        return
    _refuse_ignored(check, [("--headers-only", headers_only), ("--fail-on", fail_on)], "goes with `--check`")
    _refuse_ignored(
        measuring and not (headers_only and not (stats or compare or plot)),
        [("--device", device), ("--base", base)],
        "goes with what measures: `--stats`, `--compare`, `--plot` or `--check`",
    )
    _refuse_ignored(
        tags or stats or compare is not None, [("--top", top)], "goes with `--tags`, `--stats` or `--compare`"
    )
    _refuse_ignored(stats or check, [("--sort strength", sort == "strength")], "goes with `--stats`")
    _refuse_ignored(check, [("--sort findings", sort == "findings")], "goes with `--check`")
    if len(names) > 1 and not json_output:
        whole = [("--modules", modules), ("--blocks", blocks), ("--metadata", metadata), ("--tags", tags),
                 ("--hashes", hashes), ("--top", top)]  # fmt: skip
        _refuse_ignored(False, whole, f"shows one FILE; of {len(names)} it goes with `--json`")
    if len(names) > 1 and (compare is not None or plot is not None):
        raise UsageError(f"{'--compare' if compare else '--plot'} takes one FILE, these are {len(names)}")
    if plot == "-" and json_output:
        raise UsageError("`--plot -` and `--json` both write to standard output")
    if plot is not None:
        _check_plot(plot, names[0], force=force)
    options = InspectOptions(
        modules=modules,
        blocks=blocks or plot is not None,
        hashes=hashes,
        tags=tags,
        stats=stats or (plot is not None and compare is None),
        check="none" if not check else "header" if headers_only else "all",
        compare=compare,
        base=base,
        device=device or "auto",
        allow_pickle=allow_pickle,
        strict=strict,
        reading=opt.reading(alpha_zero, dora_strength, dylora_block_size, legacy_loha_cp, glora_old_scale),
    )
    least = fail_on or "warning"
    if len(names) > 1:
        _many(names, options, out, sort, reverse=reverse, fail_on=least)
        return
    with out.progress() as bar:
        report = run(names[0], options, progress=bar)
    if options.stats and report.stats is None:
        raise IncompatibleError("is no adapter: only changes of weights are measured", path=names[0])
    if json_output:
        out.listing([json_text(_document(report, modules=modules))], [])
    else:
        from lycotool.cli._inspect_tables import show

        show(report, out, metadata=metadata, stats=stats, top=20 if top is None else top)
    if plot is not None:
        _plot(report, plot, out)
    if check:
        from lycotool.ops._inspect_overview import overview_of

        _fail_on([overview_of(report)], least)


def _refuse_ignored(is_used: bool, options: Sequence[tuple[str, object]], why: str) -> None:
    """Refuse options that nothing would heed.

    Raises
    ------
    UsageError
        Naming the first of them that was given.
    """
    for name, value in options:
        if not is_used and value is not None and value is not False:
            raise UsageError(f"`{name}` {why}")


def _many(
    names: Sequence[str],
    options: InspectOptions,
    out: Output,
    sort: str | None,
    *,
    reverse: bool,
    fail_on: Literal["error", "warning", "info"],
) -> None:
    """A line, or an error, for each of several files; in full with `--json`."""
    from lycotool.cli._inspect_list import order_of, show_list
    from lycotool.ops._inspect_overview import Overview, of_each, overview, overview_of
    from lycotool.ops.inspect import inspect as run

    def whole(name: str, bar: Progress | None = None) -> tuple[Overview, str]:
        report = run(name, options, progress=bar)
        text = json_text(_document(report, modules=options.modules)) if out.json else ""
        return overview_of(report), text

    rows: list[Overview] = []
    texts: list[str] = []
    errors: list[LycotoolError] = []
    found: Iterable[tuple[Overview, str] | Overview | LycotoolError]
    with ExitStack() as shown:
        if options.stats or options.check != "none" or options.hashes:
            bar = shown.enter_context(out.progress())
            found = of_each(lambda name: whole(name, bar), names, at_once=False)
        elif out.json:
            found = of_each(whole, names)
        else:
            found = of_each(lambda name: overview(name, options), names)
        for one in found:
            if isinstance(one, LycotoolError):
                errors.append(one)
            elif isinstance(one, Overview):
                rows.append(one)
            else:
                rows.append(one[0])
                texts.append(one[1])
    order = order_of(rows, sort, reverse=reverse)
    if out.json:
        out.listing([texts[number] for number in order], faults(errors))
    else:
        show_list([rows[number] for number in order], errors)
    end_with(errors)
    _fail_on(rows, fail_on)


def _document(report: InspectReport, *, modules: bool) -> dict[str, object]:
    """One file's JSON; singular values only with its modules."""
    document = dataclasses.asdict(report)
    if not modules:
        document["modules"] = report.module_count
    if report.stats is not None and not modules:
        for row in document["stats"]["modules"]:
            del row["values"]
    return document


def _fail_on(rows: Sequence[Overview], least: Literal["error", "warning", "info"]) -> None:
    """End with exit code 10 where a check found something of that weight.

    Raises
    ------
    CheckError
        Counting them.
    """
    from lycotool.ops._findings import SEVERITIES

    counts = {
        severity: sum((row.findings or {}).get(severity, 0) for row in rows)
        for severity in reversed(SEVERITIES)
    }
    if any(counts[severity] for severity in SEVERITIES[SEVERITIES.index(least) :]):
        found = ", ".join(f"{number} {severity}" for severity, number in counts.items() if number)
        raise CheckError(f"found {found}", path=rows[0].path if len(rows) == 1 else None)


def _check_plot(plot: str, name: str, *, force: bool) -> None:
    """Refuse what cannot be drawn to, before anything is measured.

    Raises
    ------
    UsageError
        If the name has another ending.
    OutputError
        If it cannot be written.
    """
    from lycotool.io.writer import prepare_output

    if plot == "-":
        return
    if not plot.lower().endswith((".png", ".svg")):
        raise UsageError(
            "a plot is a .png or an .svg file", path=plot, hint="`--plot -` draws bars in the terminal"
        )
    inputs = [Path(name)] if Path(name).is_file() else []
    prepare_output(plot, inputs=inputs, force=force)


def _plot(report: InspectReport, plot: str, out: Output) -> None:
    """Draw to a file, or as bars where there is no terminal for pictures or nothing to draw with."""
    from lycotool.cli._bars import show_bars
    from lycotool.cli._plots import draw, is_available

    if plot != "-" and is_available():
        draw(report, plot)
        out.note(f"wrote {plot}")
        return
    if not out.json:
        show_bars(report)
    if plot != "-":
        raise OutputError(
            "not written: drawing needs matplotlib; the bars are the same figures",
            path=plot,
            hint="pip install 'lycotool[plot]', or `--plot -` for the bars alone",
        )
