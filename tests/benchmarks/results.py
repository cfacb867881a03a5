"""Rows of figures, their ratios to the yardsticks and limits, as a table, as Markdown, as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.cases import Case, Limit
from benchmarks.measure import MIB, Run


@dataclass(frozen=True, slots=True)
class Row:
    """One command: medians over the rounds, and what it is compared with.

    ``ratios`` are to each yardstick of the same rounds; ``limits`` are texts with the share of the
    limit that was used.
    """

    case: str
    name: str
    rounds: int
    seconds: float
    least: float
    most: float
    cpu: float
    rss: int
    anonymous: int
    gpu: int | None
    yardstick: bool
    ratios: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case that was run."""

    name: str
    title: str
    rows: tuple[Row, ...]
    alone: Mapping[str, object]
    checks: Mapping[str, object]
    absent: Mapping[str, str]


def outcome(
    case: Case, runs: Mapping[str, Sequence[Run]], alone: Mapping[str, object], checks: Mapping[str, object]
) -> Outcome:
    """Medians, and ratios of what ran in the same rounds."""
    yardsticks = [c for c in case.commands if c.yardstick]
    rows = []
    for command in case.commands:
        mine = runs[command.name]
        seconds = [one.seconds for one in mine]
        ratios = {}
        if not command.yardstick:
            for other in yardsticks:
                if other.of and command.name not in other.of:
                    continue
                pairs = [a.seconds / b.seconds for a, b in zip(mine, runs[other.name], strict=False)]
                ratios[other.name] = statistics.median(pairs)
        gpus = [one.gpu for one in mine if one.gpu is not None]
        rows.append(
            Row(
                case=case.name,
                name=command.name,
                rounds=len(mine),
                seconds=statistics.median(seconds),
                least=min(seconds),
                most=max(seconds),
                cpu=statistics.median(one.cpu for one in mine),
                rss=max(one.rss for one in mine),
                anonymous=max(one.anonymous for one in mine),
                gpu=max(gpus, default=None),
                yardstick=command.yardstick,
                ratios=ratios,
                limits={limit.text: _used(limit, runs) for limit in case.limits if limit.row == command.name},
            )
        )
    return Outcome(case.name, case.title, tuple(rows), alone, checks, case.absent)


def _used(limit: Limit, runs: Mapping[str, Sequence[Run]]) -> float:
    """The share of a limit that was used: the median over the rounds."""
    mine = runs[limit.row]
    if limit.measure != "seconds":
        return max(getattr(one, limit.measure) for one in mine) / limit.plus
    shares = []
    for index, one in enumerate(mine):
        allowed = limit.plus
        for name, factor in limit.factors.items():
            others = runs[name]
            allowed += factor * others[min(index, len(others) - 1)].seconds
        shares.append(one.seconds / allowed)
    return statistics.median(shares)


TITLES = ("", "wall s", "min-max", "CPU s", "RSS MiB", "own MiB", "GPU MiB", "× yardstick", "of the limit")


def cells(row: Row) -> tuple[str, ...]:
    """A row as texts."""
    digits = 3 if row.seconds < 1 else 2
    return (
        row.name,
        f"{row.seconds:.{digits}f}",
        f"{row.least:.{digits}f}-{row.most:.{digits}f}" if row.rounds > 1 else "once",
        f"{row.cpu:.{digits}f}",
        f"{row.rss / MIB:.0f}",
        f"{row.anonymous / MIB:.0f}",
        "" if row.gpu is None else f"{row.gpu / MIB:.0f}",
        ", ".join(f"{ratio:.2f} {name}" for name, ratio in row.ratios.items()),
        ", ".join(f"{100 * used:.0f} % of {text}" for text, used in row.limits.items()),
    )


def notes(found: Outcome) -> list[str]:
    """What stands below a case's table."""
    lines = []
    for name, answer in {**found.alone, **found.checks}.items():
        shown = ", ".join(f"{key} {_number(value)}" for key, value in _flat(answer) if value is not None)
        lines.append(f"{name}: {shown}")
    return lines + [f"{name}: not measured, {why}" for name, why in found.absent.items()]


def _flat(answer: object) -> Iterable[tuple[str, object]]:
    if isinstance(answer, dict):
        for key, value in answer.items():
            if isinstance(value, dict):
                yield from ((f"{key}, {inner}", v) for inner, v in value.items())
            elif key == "gpu" and isinstance(value, int):
                yield "GPU MiB", value / MIB
            else:
                yield key, value


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(found: Outcome) -> None:
    """Print a case: with Rich where it is, as plain columns elsewhere."""
    lines = [cells(row) for row in found.rows]
    print(f"\n{found.name}: {found.title}", flush=True)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(TITLES, *lines, strict=True)]
        for line in (TITLES, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    else:
        table = Table(box=None, pad_edge=False)
        for index, title in enumerate(TITLES):
            numeric = 0 < index < 7
            table.add_column(title, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
        for row, line in zip(found.rows, lines, strict=True):
            over = any(used > 1 for used in row.limits.values())
            table.add_row(*line, style="dim" if row.yardstick else "yellow" if over else None)
        console = Console(markup=False)
        console = console if console.is_terminal else Console(markup=False, width=200)
        console.print(table)
    for note in notes(found):
        print(f"  {note}", flush=True)


def markdown(outcomes: Iterable[Outcome]) -> str:
    """All cases as one table, for a page."""
    lines = [
        "| what | wall s | CPU s | RSS MiB | GPU MiB | × yardstick | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in outcomes:
        lines.append(f"| **{found.title}** | | | | | | |")
        for row in found.rows:
            name, wall, _, cpu, rss, _, gpu, ratios, limits = cells(row)
            lines.append(
                f"| {f'*{name}*' if row.yardstick else name} | {wall} | {cpu} | {rss} | {gpu} | {ratios} | {limits} |"
            )
        lines += [f"| {note} | | | | | | |" for note in notes(found)]
    return "\n".join(lines) + "\n"


def document(outcomes: Iterable[Outcome], machine: Mapping[str, object]) -> dict[str, object]:
    """Everything, for a file."""
    return {"machine": dict(machine), "cases": [asdict(one) for one in outcomes]}
