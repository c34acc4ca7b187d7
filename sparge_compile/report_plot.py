"""Figures of a report: the density of every site and head, and the tiles of one head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparge_compile.report import Report, SiteReport
from sparge_kernels.thresholds import K_TILE, Q_TILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_NAME, _LONGEST_REASON = 48, 70
_COMPUTED, _SKIPPED, _HIDDEN, _DENSE = "#1f4e79", "#f3c98b", "#ffffff", "#e4e4e4"


def densities(report: Report) -> Figure:
    """A heat map: a row per site, a column per query head; sites that stayed dense are hatched, with the reason.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no sites, or none was rewritten and measured.
    """
    figure_type = _figure_type()
    if not any(site.head_densities for site in report.sites):
        raise ValueError("no site of this report has measured densities to plot; explain(model, ...) measures them.")
    sites = report.sites
    heads = max(len(site.head_densities or ()) for site in sites)
    size = max(5.0, min(8.0, 600 / len(sites)))  # of letters: rows of many sites are lower
    height = size * 1.6 / 72
    width = 3.5 + max(3.0, min(8.0, 0.35 * heads))
    figure = figure_type(figsize=(width, 1.4 + height * len(sites)), layout="constrained")
    axes = figure.subplots()
    values = [list(site.head_densities or ()) + [math.nan] * (heads - len(site.head_densities or ())) for site in sites]
    image = axes.imshow(values, aspect="auto", vmin=0.0, vmax=1.0, cmap="viridis", interpolation="nearest")
    for row, site in enumerate(sites):
        if not site.head_densities:
            _mark_dense(axes, row, heads, site, size)
    axes.set_title(f"Share of tiles computed\n{_summary(report)}", fontsize=9)
    axes.set_xlabel("query head", fontsize=9)
    step = max(1, math.ceil(heads / 16))
    axes.set_xticks(range(0, heads, step), [str(head) for head in range(0, heads, step)], fontsize=8)
    axes.set_yticks(range(len(sites)), [_short(site.name, _LONGEST_NAME) for site in sites], fontsize=size)
    axes.tick_params(length=2)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3.0 / (height * len(sites))), pad=0.02)
    bar.set_label("density (computed / visible tiles)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def tiles(report: Report, site: str, head: int) -> Figure:
    """The tile map of one query head: queries downwards, keys to the right, in tokens.

    Raises:
        ImportError: matplotlib is not installed.
        KeyError, ValueError: as `Report.tile_map`.
    """
    figure_type = _figure_type()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    chosen = report.tile_map(site, head)
    of_site = next(one for one in report.rewritten if one.name == site)
    assert of_site.head_densities is not None
    (q_tiles, k_tiles), density = chosen.shape, of_site.head_densities[head]
    seen = _seen_by_causality(q_tiles, k_tiles) if of_site.is_causal else torch.ones_like(chosen)
    figure = figure_type(figsize=(5.2, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        torch.where(chosen, 2, seen.int()),
        aspect="auto",
        vmin=0,
        vmax=2,
        cmap=ListedColormap([_HIDDEN, _SKIPPED, _COMPUTED]),
        extent=(0, k_tiles * K_TILE, q_tiles * Q_TILE, 0),
        interpolation="nearest",
    )
    axes.set_xlabel(f"key (tokens, tiles of {K_TILE})", fontsize=9)
    axes.set_ylabel(f"query (tokens, tiles of {Q_TILE})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_title(f"{_short(site, 60)}, head {head}: density {density:.3f}", fontsize=9)
    labels = {_COMPUTED: "computed", _SKIPPED: "skipped, or hidden by the mask" if of_site.masked else "skipped"}
    if of_site.is_causal:
        labels[_HIDDEN] = "in the future"
    patches = [Patch(facecolor=colour, edgecolor="#808080", label=label) for colour, label in labels.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    return figure


def _seen_by_causality(q_tiles: int, k_tiles: int) -> Tensor:
    """Bool [q_tiles, k_tiles]: some query of the tile sees some key of the tile."""
    last_query = torch.arange(1, q_tiles + 1)[:, None] * Q_TILE - 1
    return torch.arange(k_tiles) * K_TILE <= last_query


def _mark_dense(axes: Axes, row: int, heads: int, site: SiteReport, size: float) -> None:
    from matplotlib.patches import Rectangle

    shape: dict[str, Any] = {"facecolor": _DENSE, "edgecolor": "#bdbdbd", "hatch": "////", "linewidth": 0}
    axes.add_patch(Rectangle((-0.5, row - 0.5), heads, 1, **shape))
    words = "not run" if site.rewritten else f"dense: {(site.reason or '').partition(';')[0].partition(':')[0]}"
    axes.text(
        (heads - 1) / 2,
        row,
        _short(words, _LONGEST_REASON),
        ha="center",
        va="center",
        fontsize=size - 1,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        clip_on=True,
    )


def _summary(report: Report) -> str:
    rewritten = f"{len(report.rewritten)} of {len(report.sites)} attention calls rewritten"
    return rewritten if report.speedup is None else f"{rewritten}, {report.speedup:.2g} times as fast as dense"


def _short(text: str, longest: int) -> str:
    """The text, without its middle if it is long."""
    kept = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:kept]}…{text[-kept:]}"


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Report.plot needs matplotlib: pip install 'sparge-compile[plot]'") from error
    return Figure
