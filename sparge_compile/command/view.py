"""What the commands print, with rich: colours in a terminal, plain text where it is piped, 100 columns at most."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sparge_compile.command.findings import Diagnosis, Section

WIDTH, NAME_WIDTH = 100, 22
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
    if not sys.stderr.isatty():  # rich takes FORCE_COLOR for a terminal, and would write its codes into a pipe
        yield lambda words: None
        return
    with console(stderr=True).status("") as status:
        yield status.update


def write_json(content: Mapping[str, Any], where: str | None) -> None:
    """Prints the content ("-"), or writes it to a file. JSON has no NaN and no infinity: they are null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    if where == "-":
        print(text)
    elif where is not None:
        Path(where).write_text(text + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def show_section(section: Section) -> None:
    """A section of the doctor's, at once. Of a pipe each finding is one line, whatever its length, to be searched."""
    from rich.table import Table
    from rich.text import Text

    if not section.findings:
        return
    out = console()
    out.print(Text(section.title, style="bold"))
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2)
    table.add_column(width=NAME_WIDTH, overflow="fold")
    table.add_column(overflow="fold")
    for one in section.findings:
        advice = f" -> {one.advice}" if one.advice and one.level == "note" else ""
        mark, words = (Text(text, style=STYLES[one.level]) for text in (MARKS[one.level], one.value + advice))
        if sys.stdout.isatty():
            table.add_row(mark, Text(one.name), words)
        else:
            out.print(Text.assemble(mark, f" {one.name:<{NAME_WIDTH}} ", words), soft_wrap=True)
    if sys.stdout.isatty():
        out.print(table)


def show_problems(diagnosis: Diagnosis, seconds: float) -> None:
    """What the doctor says at the end: all problems, with what to do, and how many there are."""
    from rich.text import Text

    out = console()
    out.print()
    for one in diagnosis.problems:
        words = Text.assemble((f"{one.name}: {one.value}", "bold red"), f" -> {one.advice}")
        out.print(words, soft_wrap=not sys.stdout.isatty())
    count = len(diagnosis.problems)
    summary = "All is well" if not count else "1 problem" if count == 1 else f"{count} problems"
    out.print(Text(f"{summary} ({seconds:.0f} s).", style="bold red" if count else "bold green"))
