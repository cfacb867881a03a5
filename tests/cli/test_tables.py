"""Tables where there is no terminal, against Rich's own layout."""

from __future__ import annotations

import io

import pytest
from examples import many
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lycotool.cli._tables import add_row, show_tables, table_of
from lycotool.cli._text import clean

cells = (
    st.text(st.characters(codec="utf-8"), max_size=12)
    | st.integers()
    | st.sampled_from(["", "日本", "é", "  "])
)


def by_rich(headings: list[str], rows: list[list[object]], *, has_header: bool) -> list[str]:
    """The lines as Rich lays them out on a page without end, without spaces at the end."""
    table = Table(box=None, pad_edge=False, show_header=has_header)
    for heading in headings:
        table.add_column(Text(clean(heading)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in row))
    out = io.StringIO()
    Console(file=out, width=10_000, highlight=False, markup=False, emoji=False, no_color=True).print(table)
    return [line.rstrip(" ") for line in out.getvalue().split("\n")[:-1]]


@many
@given(
    headings=st.lists(st.sampled_from(["file", "", "‖ΔW‖₂", "loads in"]), min_size=1, max_size=4),
    rows=st.lists(st.lists(cells, min_size=1, max_size=4), max_size=4),
    has_header=st.booleans(),
)
def test_lines_are_those_of_rich(headings: list[str], rows: list[list[object]], has_header: bool) -> None:
    rows = [row[: len(headings)] for row in rows]
    if not rows and not has_header:
        return
    table = table_of(*headings, has_header=has_header)
    for row in rows:
        add_row(table, *row)

    assert table.lines() == by_rich(headings, rows, has_header=has_header)


def test_tables_stand_apart(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = table_of("a", "b"), table_of("", "", has_header=False)
    add_row(first, "long cell", 1)
    add_row(second, "x", "y")
    show_tables([first, second])

    assert capsys.readouterr().out == "a          b\nlong cell  1\n\nx  y\n"
