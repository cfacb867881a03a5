"""Pictures of what `inspect --stats` and `--compare` measure, by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lycotool.cli._text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from lycotool.ops._inspect_compare import Comparison, PairRow
    from lycotool.ops._inspect_stats import ModuleStats, Stats
    from lycotool.ops.inspect import InspectReport

#: Inches, at so many pixels each: 1600 x 1120.
_SIZE, _DPI = (12.8, 8.96), 125

#: Kinds of layers shown; the rest stands together.
_KINDS = 18

#: Colours that are told apart by eyes with any colour vision (Okabe and Ito), by component.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREY = "#6b7280"

_STYLE: Any = {
    "text.parse_math": False,  # a file's `$` is a dollar
    "svg.hashsalt": "lycotool",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: InspectReport, path: str) -> None:
    """Draw a report's comparison, or its statistics, to a ``.png`` or ``.svg`` file.

    Equal reports give equal bytes with one version of matplotlib.

    Raises
    ------
    OutputError
        If the file cannot be written; what had its name is then as it was.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lycotool.io.whole import whole_file

    kind = "svg" if path.lower().endswith(".svg") else "png"
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        if report.comparison is not None:
            _draw_comparison(figure, report.comparison)
        elif report.stats is not None:
            _draw_stats(figure, report, report.stats)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    target = Path(path).resolve()
    with whole_file(target, len(drawn.getbuffer())) as file:
        file.write(drawn.getbuffer())


def _draw_stats(figure: Figure, report: InspectReport, stats: Stats) -> None:
    name = clean(Path(report.path).name, limit=60)
    figure.suptitle(
        f"{name}: {report.architecture}, {stats.totals.modules} modules, ‖ΔW‖ = {stats.totals.fro:.3g}",
        fontsize=14, x=0.01, ha="left",
    )  # fmt: skip
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.15))
    measured = [m for m in stats.modules if m.fro is not None]
    _draw_blocks(figure.add_subplot(grid[0, :]), measured)
    _draw_decay(figure.add_subplot(grid[1, 0]), measured)
    _draw_kinds(figure.add_subplot(grid[1, 1]), measured)


def _blocks_in_order(rows: Iterable[ModuleStats | PairRow]) -> list[str]:
    """Labels of the blocks, text encoders first, numbers by their size."""
    labels = dict.fromkeys(row.block or row.component for row in rows)

    def place(label: str) -> tuple[int, list[tuple[int, str]]]:
        head = label.rstrip("0123456789")
        group = {"BASE": 0, "CLIP": 0, "T5": 1, "IN": 2, "M": 3, "D": 3, "S": 5, "OUT": 6, "-": 9}.get(
            head, 4
        )
        digits = label[len(head) :]
        return group, [(int(digits) if digits else -1, label)]

    return sorted(labels, key=place)


def _draw_blocks(axes: Axes, modules: Sequence[ModuleStats]) -> None:
    blocks = _blocks_in_order(modules)
    components = list(dict.fromkeys(m.component for m in modules))
    below = [0.0] * len(blocks)
    for component, colour in zip(components, _cycle(len(components)), strict=True):
        energy = [
            math.fsum((m.fro or 0) ** 2 for m in modules if m.component == component and _block(m) == block)
            for block in blocks
        ]
        # Stacked so that a bar's height is the root of the block's whole energy.
        heights = [math.sqrt(low**2 + more) - low for low, more in zip(below, energy, strict=True)]
        axes.bar(range(len(blocks)), heights, bottom=below, color=colour, label=component, width=0.8)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    _name_blocks(axes, blocks)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_ylabel("‖ΔW‖ of the block")
    axes.set_title("Strength by block")
    axes.grid(visible=False, axis="x")
    if len(components) > 1:
        axes.legend(ncols=len(components), loc="upper right")


def _name_blocks(axes: Axes, blocks: Sequence[str]) -> None:
    shown = ["outside" if block == "-" else clean(block, limit=16) for block in blocks]
    crowded = sum(map(len, shown)) + len(shown) > 110
    axes.set_xticks(
        range(len(blocks)), shown, rotation=90 if crowded else 0, fontsize=8 if len(blocks) > 30 else 9
    )


def _block(row: ModuleStats | PairRow) -> str:
    return row.block or row.component


def _draw_decay(axes: Axes, modules: Sequence[ModuleStats]) -> None:
    """``σ_k / σ_1`` of every module, and what most of them do."""
    from matplotlib.ticker import MaxNLocator

    alive = [m for m in modules if m.values and m.values[0] > 0 and len(m.values) > 1]
    axes.set_title(f"Decay of the singular values ({len(alive)} modules)")
    axes.set_ylabel("σₖ / σ₁")
    axes.set_xlabel("k")
    if not alive:
        axes.text(0.5, 0.5, "no module has more than one", ha="center", transform=axes.transAxes, color=_GREY)
        return
    floor = 1e-4
    curves = [[max(value / m.values[0], floor) for value in m.values if value > 0] for m in alive]
    longest = max(map(len, curves))
    for curve in curves:
        axes.plot(
            range(1, len(curve) + 1),
            curve,
            color=_COLOURS[0],
            linewidth=0.6,
            alpha=max(0.05, min(0.5, 30 / len(curves))),
        )
    bands = [sorted(curve[k] for curve in curves if k < len(curve)) for k in range(longest)]
    bands = [band for band in bands if len(band) >= len(curves) / 10]  # of fewer no middle can be told
    ks = range(1, len(bands) + 1)
    axes.fill_between(
        ks, [_quantile(band, 0.1) for band in bands], [_quantile(band, 0.9) for band in bands],
        color=_COLOURS[1], alpha=0.3, linewidth=0, label="10 % to 90 % of the modules with k values",
    )  # fmt: skip
    axes.plot(
        ks, [statistics.median(band) for band in bands], color=_COLOURS[5], linewidth=2.2, label="median"
    )
    _make_log(axes, "y")
    axes.set_ylim(bottom=max(floor, 0.7 * min(min(curve) for curve in curves)), top=1.3)
    if longest > 64:
        _make_log(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left")


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _draw_kinds(axes: Axes, modules: Sequence[ModuleStats]) -> None:
    """Every module as a point beside the others of its kind."""
    groups: dict[str, list[ModuleStats]] = {}
    for m in modules:
        if m.fro:
            groups.setdefault(m.layer, []).append(m)
    kinds = sorted(groups, key=lambda kind: -len(groups[kind]))[:_KINDS]
    rest = [m for kind in groups if kind not in kinds for m in groups[kind]]
    shown = {
        kind: groups[kind] for kind in sorted(kinds, key=lambda kind: statistics.median(_rms(groups[kind])))
    }
    if rest:
        shown = {f"{len(groups) - len(kinds)} other kinds": rest, **shown}
    components = list(dict.fromkeys(m.component for m in modules))
    colours = dict(zip(components, _cycle(len(components)), strict=True))
    for height, members in enumerate(shown.values()):
        axes.scatter(
            _rms(members), [height] * len(members), s=14, alpha=0.45, linewidths=0,
            color=[colours[m.component] for m in members],
        )  # fmt: skip
        axes.plot(
            [statistics.median(_rms(members))] * 2,
            [height - 0.38, height + 0.38],
            color="black",
            linewidth=1.6,
        )
    axes.set_yticks(range(len(shown)), [clean(kind, limit=28) for kind in shown], fontsize=8.5)
    _make_log(axes, "x")
    axes.set_xlabel("root mean square of ΔW's elements (line: median)")
    axes.set_title("Strength by kind of layer")


def _make_log(axes: Axes, name: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade, fewer where it has many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if name == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    decades = math.log10(high / low) if 0 < low <= high < math.inf else 9.0
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _rms(modules: Sequence[ModuleStats]) -> list[float]:
    return [m.rms or 0.0 for m in modules]


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _draw_comparison(figure: Figure, c: Comparison) -> None:
    rows = [row for row in c.layers if row.cosine is not None]
    a, b = (clean(Path(path).name, limit=40) for path in (c.path, c.other))
    cosine = "-" if c.cosine is None else f"{c.cosine:.3g}"
    figure.suptitle(
        f"{a} (A) against {b} (B): {c.compared} layers, cosine {cosine}", fontsize=14, x=0.01, ha="left"
    )
    if not rows:
        figure.text(0.5, 0.5, "no layer could be compared", ha="center", color=_GREY)
        return
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.35, 1))
    above, below = parts[0, 0], parts[1, 0]
    left, middle, right = below.subplots(1, 3)
    limit = max(0.05, math.ceil(20 * max((abs(row.cosine or 0.0) for row in rows), default=1.0)) / 20)
    _draw_map(above, above.subplots(), rows, limit)
    _draw_histogram(left, [row.cosine or 0.0 for row in rows])
    _draw_overlap(middle, rows)
    _draw_norms(right, rows)


def _draw_map(figure: SubFigure, axes: Axes, rows: Sequence[PairRow], limit: float) -> None:
    """The cosine of every kind of layer in every block, weighted by the norms' product."""
    blocks = _blocks_in_order(rows)
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.layer] = sizes.get(row.layer, 0) + 1
    kinds = sorted(sorted(sizes, key=lambda kind: -sizes[kind])[:_KINDS])
    sums: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        kind = row.layer if row.layer in kinds else "others"
        weight = (row.norm or 0.0) * (row.other_norm or 0.0)
        sums.setdefault((kind, _block(row)), []).append((weight, row.cosine or 0.0))
    if len(sizes) > len(kinds):
        kinds.append("others")
    cells = [[_weighted(sums.get((kind, block), ())) for block in blocks] for kind in kinds]
    axes.set_facecolor("#9ca3af")
    image = axes.imshow(cells, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    _name_blocks(axes, blocks)
    axes.set_yticks(range(len(kinds)), [clean(kind, limit=28) for kind in kinds], fontsize=8.5)
    axes.grid(visible=False)
    axes.set_title("Cosine of ΔA and ΔB by block and kind of layer (grey: no layer in both)")
    figure.colorbar(image, ax=axes, label="cosine", pad=0.01, fraction=0.03)


def _weighted(found: Iterable[tuple[float, float]]) -> float:
    pairs = list(found)
    total = math.fsum(weight for weight, _ in pairs)
    return math.fsum(weight * value for weight, value in pairs) / total if total else math.nan


def _draw_histogram(axes: Axes, cosines: Sequence[float]) -> None:
    limit = max(0.05, math.ceil(20 * max(map(abs, cosines), default=1.0)) / 20)
    axes.hist(cosines, bins=40, range=(-limit, limit), color=_COLOURS[0])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_title("Cosines")
    axes.set_xlabel("cosine of ΔA and ΔB")
    axes.set_ylabel("layers")


def _draw_overlap(axes: Axes, rows: Sequence[PairRow]) -> None:
    pairs = [(row.overlap_in or 0.0, row.overlap_out or 0.0, row.cosine or 0.0) for row in rows]
    colours = [_COLOURS[5] if cosine > 0 else _COLOURS[0] for _, _, cosine in pairs]
    axes.scatter(
        [pair[0] for pair in pairs], [pair[1] for pair in pairs], s=14, alpha=0.5, color=colours, linewidths=0
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("Overlap of what they read and write")
    axes.set_xlabel("overlap of inputs (red: cosine > 0)")
    axes.set_ylabel("overlap of outputs")


def _draw_norms(axes: Axes, rows: Sequence[PairRow]) -> None:
    ours, theirs = [row.norm or 0.0 for row in rows], [row.other_norm or 0.0 for row in rows]
    axes.scatter(ours, theirs, s=14, alpha=0.5, color=_COLOURS[2], linewidths=0)
    if rows:
        ends = [min(ours + theirs), max(ours + theirs)]
        axes.plot(ends, ends, color="black", linewidth=1, label="equal")
        _make_log(axes, "x")
        _make_log(axes, "y")
        axes.legend(loc="upper left")
    axes.set_title("Strength")
    axes.set_xlabel("‖ΔA‖ of a layer")
    axes.set_ylabel("‖ΔB‖ of a layer")
