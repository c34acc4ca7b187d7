"""A report for people: a table of at most 100 columns, plain or in colours, and why what stayed dense did."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from sparge_compile import dynamo
from sparge_compile.markers import ATTACHED_SOURCE
from sparge_compile.reasons import what_to_change
from sparge_compile.report import Report, SiteReport
from sparge_compile.report_groups import Group, grouped

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 100
_COLUMNS = ("thresholds", "queries\nx keys", "heads\nx dim", "dtype", "mask", "density", "times\nas fast")
_FIRST_TO_GO = ("heads\nx dim", "dtype", "mask", "queries\nx keys", "thresholds")
"""Columns that narrow terminals do without."""
_WIDEST = 17
_NARROWEST_SITE = 20
_GAP = 2
_LABELS = 12
"""So many names stand below a reason; all of them stand in the table."""
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def plain(report: Report) -> str:
    """The table as text."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(report)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def show(report: Report, file: IO[str] | None) -> None:
    """Prints the table; in colours on a terminal, unless NO_COLOR is set."""
    from rich.console import Console

    console = Console(file=file)
    if not console.is_terminal and not console.is_jupyter:
        print(plain(report), file=file)
        return
    console.print(report)


def rendered(report: Report, width: int) -> Iterator[RenderableType]:
    """The parts of the table for rich, from the top."""
    from rich.constrain import Constrain
    from rich.padding import Padding
    from rich.text import Text

    width = min(width, WIDTH)

    def text(content: str, style: str = "", indent: int = 0) -> RenderableType:
        return Constrain(Padding(Text(content, style=style), (0, 0, 0, indent), expand=False), width)

    yield text(f"{len(report.rewritten)} of {len(report.sites)} attention calls rewritten", "bold")
    speed = in_words(report)
    if speed is not None:
        yield text(speed, "bold green" if (report.speedup or 0) > 1 else "bold red")
    if report.sites:
        yield _table(report.sites, width)
    by_reason = _by_reason(report.dense)
    if by_reason:
        yield text("stayed dense:", "bold")
    for reason, groups in by_reason.items():
        yield text(reason, indent=2)
        change = what_to_change(reason)
        if change is not None:
            yield text(f"to change: {change}", "cyan", indent=4)
        yield text(_few(groups), "dim", indent=4)
    for line in (*_recompiles(report.sites), *report.notes):
        yield text(line, "yellow")


def in_words(report: Report) -> str | None:
    """What the rewrite gained in this run; None if no rewritten call was timed."""
    speedup, timed = report.speedup, [site for site in report.rewritten if site.dense_ms is not None]
    if speedup is None or not timed:
        return None
    dense = sum(site.dense_ms or 0.0 for site in report.sites)
    how = f"{times(speedup)} times as fast as dense ({_ms(dense / speedup)} instead of {_ms(dense)} ms)"
    words = f"attention part: {'slower, ' if speedup < 1 else ''}{how}, measured on this run's tensors"
    untimed = sum(site.dense_ms is None for site in report.sites)
    if untimed:
        words += f"; {untimed} of {len(report.sites)} calls not timed"
    if speedup < 1:
        slowest = min(timed, key=lambda site: (site.dense_ms or 0.0) - (site.sparse_ms or 0.0)).name
        words += f"; keep what does not pay dense: raise min_tokens, or name calls such as {slowest} in Policy.dense"
    return words


def _facts(site: SiteReport) -> tuple[Any, ...]:
    """What the rows of one group have in common: all that is shown but densities and times."""
    return (*_cells(site), site.pattern, site.rewritten, site.reason)


def _cells(site: SiteReport) -> tuple[str, ...]:
    return (
        _set_by(site),
        _product(site.q_len, site.k_len),
        _product(site.heads, site.head_dim),
        _SHORT.get(site.dtype or "", _shown(site.dtype)),
        "causal" if site.is_causal else ("given" if site.masked else "-"),
    )


def _set_by(site: SiteReport) -> str:
    """Who set the thresholds, in a word. Which of our own rules it was is in `SiteReport.threshold_source`."""
    if not site.rewritten:
        return "dense"
    if site.threshold_source == ATTACHED_SOURCE:
        return "attached"
    return "default" if (site.threshold_source or "").startswith("rule ") else _shown(site.threshold_source)


def _product(left: object, right: object) -> str:
    return "-" if left is None and right is None else f"{_shown(left)} x {_shown(right)}"


def _table(sites: Sequence[SiteReport], width: int) -> Table:
    from rich.table import Table

    groups = grouped(sites, _facts)
    rows = [(*_cells(group.sites[0]), _density(group.sites), _times_as_fast(group.sites)) for group in groups]
    columns = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True))
    room = _room(columns, width)
    for title in _FIRST_TO_GO:
        if room < _NARROWEST_SITE:
            del columns[title]
            room = _room(columns, width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("site", width=max(room, _NARROWEST_SITE))
    for title in columns:
        table.add_column(title, max_width=_WIDEST, overflow="fold")
    for group, *cells in zip(groups, *columns.values(), strict=True):
        table.add_row(_name(group, max(room, _NARROWEST_SITE)), *map(_text, cells), style=_style(group.sites))
    return table


def _style(sites: Sequence[SiteReport]) -> str:
    if not sites[0].rewritten:
        return "yellow"
    return "red" if sum((site.dense_ms or 0.0) - (site.sparse_ms or 0.0) for site in sites) < 0 else "green"


def _room(columns: Mapping[str, Sequence[str]], width: int) -> int:
    """What is left for names beside these columns."""
    cells = [
        max(len(part) for cell in (title, *column) for part in cell.splitlines()) for title, column in columns.items()
    ]
    return width - sum(min(size, _WIDEST) + _GAP for size in cells)


def _text(content: str) -> Text:
    """As it is: nothing of a cell is markup, an emoji or a number to highlight."""
    from rich.text import Text

    return Text(content)


def _name(group: Group, width: int) -> Text:
    pattern = group.sites[0].pattern
    label = group.label if pattern == "sdpa" else f"{group.label} ({pattern.replace('_', ' ')})"
    return _text("\n".join(_broken(label, width)))


def _broken(name: str, width: int) -> list[str]:
    """The name in lines, broken behind dots, commas and spaces; a part that is too long for a line loses its middle."""
    lines = [""]
    for part in re.sub(r"([., ])", "\\1\0", name).split("\0"):
        room = width - 2  # of the lines that follow, which are indented
        if len(part) > room:
            part = part[: room // 2] + "…" + part[len(part) - (room - room // 2 - 1) :]
        if lines[-1].strip() and len((lines[-1] + part).rstrip()) > width:
            lines.append("  ")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def _density(sites: Sequence[SiteReport]) -> str:
    """What a run measured, else what is expected."""
    measured = [site.density for site in sites if site.density is not None]
    if measured:
        return _range(measured, _share)
    expected = [site.expected_density for site in sites if site.expected_density is not None]
    return f"~{_range(expected, _share)}" if expected else "-"


def _times_as_fast(sites: Sequence[SiteReport]) -> str:
    ratios = [site.dense_ms / site.sparse_ms for site in sites if site.dense_ms and site.sparse_ms]
    return _range(ratios, times) if ratios else "-"


def times(ratio: float) -> str:
    """A ratio of times with one digit behind the point, or two where one would hide on which side of 1 it is."""
    return f"{ratio:.1f}" if ratio >= 1.05 else f"{ratio:.2f}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"


def _share(density: float) -> str:
    return f"{density:.3f}"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    lowest, highest = form(min(values)), form(max(values))
    return lowest if lowest == highest else f"{lowest}-{highest}"


def _by_reason(sites: Sequence[SiteReport]) -> dict[str, list[Group]]:
    reasons: dict[str, list[Group]] = {}
    for group in grouped(sites, lambda site: site.reason):
        reasons.setdefault(group.sites[0].reason or "", []).append(group)
    return reasons


def _recompiles(sites: Sequence[SiteReport]) -> list[str]:
    """A line if the code of a call was compiled more than once."""
    again = [site for site in sites if (site.variant or 1) > 1]
    if not again:
        return []
    most = max(site.variant or 1 for site in again)
    limit = dynamo.recompile_limit()
    calls = _few(grouped(again, lambda _: None))
    return [f"compiled in up to {most} variants (torch keeps {limit} of a piece of code, then runs eagerly): {calls}"]


def _few(groups: Sequence[Group]) -> str:
    """Their labels, but no more than a few lines of them."""
    labels = [group.label for group in groups[:_LABELS]]
    rest = sum(len(group.sites) for group in groups[_LABELS:])
    return ", ".join(labels) + (f", and {rest} more" if rest else "")


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
