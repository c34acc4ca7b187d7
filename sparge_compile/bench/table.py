"""The rows in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparge_compile.bench.rows import Row


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[Row], str]


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def speed(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_min:.2f} .. {row.ratio_max:.2f})"


def note(row: Row) -> str:
    if row.trouble is not None:
        return f"not measured ({row.note})" if row.trouble == "not measured" else f"failed: {row.note}"
    return "baseline" if row.is_baseline else row.note


def which_tiles(row: Row) -> str:
    if row.is_dense:
        return ""
    return "all" if row.density_asked == 1 else row.choice


def milliseconds(row: Row) -> str:
    """Four digits, so that the table fits a terminal."""
    taken = row.milliseconds or 0.0
    return number(row.milliseconds, ".2f" if taken < 99.995 else ".1f" if taken < 999.95 else ".0f")


def speed_or_why_none(row: Row) -> str:
    if row.trouble is not None:
        return "see below"
    return "the baseline" if row.is_baseline else speed(row)


TOKENS = Column("tokens", lambda row: str(row.tokens))
DENSITY_ASKED = Column("density asked", lambda row: row.choice)
DENSITY = Column("density", lambda row: number(row.density, ".3f"))
VARIANT = Column("variant", lambda row: row.variant)
WORST_ROW = Column("cosine of the worst row", lambda row: number(row.worst_cosine, ".4f"))
NOTE = Column("note", note)

CPU_COLUMNS = (
    TOKENS,
    DENSITY_ASKED,
    DENSITY,
    VARIANT,
    Column("relative L1 to dense fp32", lambda row: number(row.relative_l1, ".2e")),
    WORST_ROW,
    Column("time (ms)", lambda row: number(row.milliseconds, ".2f")),
    Column("speed over baseline (min .. max)", speed),
    Column("effective GFLOPS", lambda row: number(row.gflops, ".1f")),
    Column("extra memory (% of Q, K, V in fp32)", lambda row: number(row.extra_memory_percent, ".1f")),
    NOTE,
)

GPU_COLUMNS = (
    TOKENS,
    DENSITY_ASKED,
    DENSITY,
    VARIANT,
    Column("relative L1 to dense fp64", lambda row: number(row.relative_l1, ".2e")),
    WORST_ROW,
    Column("time (ms)", lambda row: number(row.milliseconds, ".3f")),
    Column("prepare (ms)", lambda row: number(row.stages.get("prepare"), ".3f")),
    Column("loop (ms)", lambda row: number(row.stages.get("loop"), ".3f")),
    Column("speed over best dense (min .. max)", speed),
    Column("effective TFLOPS", lambda row: number(None if row.gflops is None else row.gflops / 1e3, ".0f")),
    Column("of the roofline", lambda row: number(row.roofline_share, ".0%")),
    Column("issue (ms)", lambda row: number(row.issue_milliseconds, ".2f")),
    Column("extra memory (% of Q, K, V)", lambda row: number(row.extra_memory_percent, ".1f")),
    NOTE,
)

COMMAND_COLUMNS = (
    TOKENS,
    VARIANT,
    Column("tiles", which_tiles),
    Column("kept", lambda row: number(row.density, ".0%")),
    Column("rel. L1", lambda row: number(row.relative_l1, ".1e")),
    Column("worst\nrow", lambda row: number(row.worst_cosine, ".3f")),
    Column("ms", milliseconds),
    Column("times as fast\nas the baseline\n(min .. max)", speed_or_why_none),
)
"""Narrow enough for a terminal of 80 columns."""


def table_head(columns: Sequence[Column]) -> str:
    return f"| {' | '.join(column.title for column in columns)} |\n|{'---|' * len(columns)}"


def table_line(columns: Sequence[Column], row: Row) -> str:
    return f"| {' | '.join(column.cell(row) for column in columns)} |"


def prepare_table(rows: Sequence[Row], density: float) -> list[str]:
    """What stage 1 and quantization take at each length, in steps and of the best dense time, at that `density`."""
    lines = [
        "| head dim | causal | tokens | keys (ms) | queries (ms) | select (ms) | prepare (ms) | of best dense (%) "
        "| copying inputs and codes, of it |",
        f"|{'---|' * 9}",
    ]
    for row in rows:
        if row.density_asked == density and "prepare" in row.stages:
            steps = [number(row.stages.get(step), ".3f") for step in ("keys", "queries", "select", "prepare")]
            shares = [number(row.prepare_percent, ".2f"), number(row.prepare_copy_share, ".0%")]
            cells = [str(row.head_dim), "yes" if row.is_causal else "no", str(row.tokens), *steps, *shares]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []
