"""What `python -m sparge_compile bench` prints: what was measured and on what, a table, and words."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sparge_compile.bench.table import COMMAND_COLUMNS
from sparge_compile.command.bench_result import Result, in_words
from sparge_compile.command.view import console

WIDEST = 1000


def show(result: Result) -> None:
    out = console()
    if result.facts:
        out.print(Text("; ".join(f"{name}: {value}" for name, value in result.facts.items())), style="dim")
    if result.calls:
        out.print(Text(f"Inputs: {in_words(result.calls, result.settings['inputs'])}."))
    if result.rows:
        wide = console()
        wide.width = WIDEST  # a terminal wraps a line that is too long; rich would cut its numbers
        wide.print(_table(result))
    said = " ".join(result.words)
    for row in result.rows:
        if row.trouble is not None and row.note not in said:
            out.print(Text(f"{row.tokens} tokens, {row.variant}: {row.trouble}: {row.note}."))
    for line in result.words:
        out.print(Text(line))


def _table(result: Result) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    numbers = {"tokens", "kept", "rel. L1", "worst\nrow", "ms"}
    for column in COMMAND_COLUMNS:
        justify: Any = "right" if column.title in numbers else "left"
        table.add_column(column.title, justify=justify, vertical="bottom")
    for row in result.rows:
        style = "bold" if row.is_ours else None
        table.add_row(*(Text(column.cell(row)) for column in COMMAND_COLUMNS), style=style)
    return table
