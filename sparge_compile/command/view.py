"""What the commands print, with rich: colours in a terminal, plain text where it is piped, 100 columns at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sparge_compile.command.bench import Result
    from sparge_compile.command.findings import Diagnosis

WIDTH = 100
MARKS = {"ok": "  ", "note": "! ", "problem": "X "}
STYLES = {"ok": "", "note": "yellow", "problem": "bold red"}


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    made.width = min(made.width, WIDTH) if made.is_terminal else WIDTH
    return made


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields what shows one line while something takes long, on a terminal's stderr only."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield lambda words: None
        return
    with shown.status("") as status:
        yield status.update


def write_json(content: Mapping[str, Any], where: str | None) -> None:
    """Prints the content ("-"), or writes it to a file."""
    text = json.dumps(content, indent=2)
    if where == "-":
        print(text)
    elif where is not None:
        Path(where).write_text(text + "\n")


def show_bench(result: Result) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sparge_compile.bench.table import COMMAND_COLUMNS

    out = console()
    if result.facts:
        out.print(Text("; ".join(f"{name}: {value}" for name, value in result.facts.items())), style="dim")
    if result.rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        numbers = {"tokens", "computed", "rel. L1", "worst row", "ms"}
        for column in COMMAND_COLUMNS:
            justify: Any = "right" if column.title in numbers else "left"
            table.add_column(column.title, justify=justify, no_wrap=column.title != "note", overflow="fold")
        for row in result.rows:
            style = "bold" if row.is_ours else None
            table.add_row(*(Text(column.cell(row)) for column in COMMAND_COLUMNS), style=style)
        out.print(table)
    for line in result.words:
        out.print(Text(line))


def show_diagnosis(diagnosis: Diagnosis, seconds: float) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    for section in diagnosis.sections:
        if not section.findings:
            continue
        out.print(Text(section.title, style="bold"))
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(width=22, overflow="fold")
        table.add_column(overflow="fold")
        for one in section.findings:
            advice = f" -> {one.advice}" if one.advice and one.level == "note" else ""
            style = STYLES[one.level]
            table.add_row(Text(MARKS[one.level], style=style), Text(one.name), Text(one.value + advice, style=style))
        out.print(table)
    out.print()
    for one in diagnosis.problems:
        out.print(Text.assemble((f"{one.name}: {one.value}", "bold red"), f" -> {one.advice}"))
    count = len(diagnosis.problems)
    summary = "All is well" if not count else "1 problem" if count == 1 else f"{count} problems"
    out.print(Text(f"{summary} ({seconds:.0f} s).", style="bold red" if count else "bold green"))
