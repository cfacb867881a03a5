"""All rows, and what can be counted of them."""

from __future__ import annotations

from reliability import arguments, container, content, kinds, pickles, shards, terminal, training, writing
from reliability.cases import Case, Elsewhere, Expected, Row, Untried

ROWS: tuple[Row, ...] = (
    *container.ROWS, *kinds.ROWS, *content.ROWS, *writing.ROWS, *pickles.ROWS, *shards.ROWS, *terminal.ROWS,
    *arguments.ROWS, *training.ROWS,
)  # fmt: skip

CASES: tuple[Case, ...] = tuple(row for row in ROWS if isinstance(row, Case))
ELSEWHERE: tuple[Elsewhere, ...] = tuple(row for row in ROWS if isinstance(row, Elsewhere))
UNTRIED: tuple[Untried, ...] = tuple(row for row in ROWS if isinstance(row, Untried))

RUNS: tuple[tuple[Case, str, Expected], ...] = tuple(
    (case, verb, expected) for case in CASES for verb, expected in case.runs()
)
