"""A profile for people: a table of its sites, a figure of its heads."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparge_compile.profile import Profile

WIDTH = 100
_HEADER = ("site", "heads", "density", "(min..max)", "error", "worst row", "keeps")
_ALIGNED = ("<", ">", ">", ">", ">", ">", "<")


def table(profile: Profile) -> str:
    """One line per site: the mean density and its range over heads, the largest error, the worst row."""
    lines = [_title(profile)]
    rows = [_HEADER, *(_row(profile, name) for name in sorted(profile.sites, key=_by_number))]
    if profile.sites:
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
        lines += [_line(row, widths) for row in rows]
    for word, reasons in (("dense", profile.dense), ("not calibrated", profile.not_calibrated)):
        lines += [
            _cut(f"{name}: {word}, {reason}")
            for name, reason in sorted(reasons.items(), key=lambda item: _by_number(item[0]))
        ]
    return "\n".join(lines)


def _title(profile: Profile) -> str:
    origin = profile.origin
    facts = [f"{len(profile.sites)} sites", f"predictor {profile.predictor}"]
    facts += [origin.model.name.rsplit(".", 1)[-1]] if origin.model else []
    facts += [origin.device] if origin.device else []
    facts += [f"error <= {origin.max_error:g}"] if origin.max_error is not None else []
    facts += [f"rows >= {origin.min_row_cosine:g}"] if origin.min_row_cosine is not None else []
    return _cut("Profile: " + ", ".join(facts))


def _row(profile: Profile, name: str) -> tuple[str, ...]:
    entries, measured = profile.sites[name], profile.measured.get(name)
    by_kind = {"cdf": [e.cdf for e in entries if e.topk is None], "topk": [e.topk for e in entries if e.topk]}
    keeps = ", ".join(f"{kind} {_range(values)}" for kind, values in by_kind.items() if values)
    heads = str(len(entries)) if len(entries) > 1 else "all"
    if measured is None:
        return name, heads, "-", "-", "-", "-", keeps
    densities = [m.density for m in measured]
    return (
        name,
        heads,
        f"{sum(densities) / len(densities):.3f}",
        f"({min(densities):.2f}..{max(densities):.2f})",
        f"{max(m.error for m in measured):.4f}",
        f"{min(m.worst_row for m in measured):.4f}",
        keeps,
    )


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _range(values: Sequence[float]) -> str:
    lowest, highest = min(values), max(values)
    return f"{lowest:g}" if lowest == highest else f"{lowest:g}..{highest:g}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0] if len(row[0]) <= widths[0] else "…" + row[0][1 - widths[0] :]
    cells = zip((first, *row[1:]), _ALIGNED, widths, strict=True)
    return "  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip()


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def plot(profile: Profile, path: str | os.PathLike[str] | None = None) -> Any:
    """A matplotlib figure: density and error, a row per site, a column per head. Saved to `path` if given.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing of the profile was measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Profile.plot needs matplotlib: pip install 'sparge-compile[plot]'") from error
    names = sorted(profile.measured, key=_by_number)
    if not names:
        raise ValueError("the profile holds no measurements to plot; profiles of calibrate() do.")
    heads = max(len(profile.measured[name]) for name in names)
    figure = Figure(figsize=(max(6.0, 1.0 + 0.5 * heads), 2.0 + 0.3 * len(names)), layout="constrained")
    shown = (("density", "density", 1.0), ("error", "error (relative L1)", None))
    for axes, (what, title, largest) in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        values = [
            [getattr(m, what) for m in profile.measured[name]] + [math.nan] * (heads - len(profile.measured[name]))
            for name in names
        ]
        image = axes.imshow(values, aspect="auto", vmin=0.0, vmax=largest)
        axes.set(title=title, xlabel="head")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=axes)
    if path is not None:
        figure.savefig(os.fspath(path))
    return figure
