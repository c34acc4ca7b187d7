"""`Report` and `SiteReport`: what a compile found, what it did with each attention call, and why."""

from __future__ import annotations

import difflib
import json
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from sparge_compile.reasons import what_to_change

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclass(frozen=True)
class SiteReport:
    """One attention call.

    Attributes:
        name: the site's name.
        rewritten: does it run `sparge::attention`?
        reason: why it stayed dense; None if rewritten.
        q_len, k_len, heads, head_dim: sizes at compile time, None where the call does not show them; q_len and k_len
            are texts such as `s27` where they are dynamic, and those of the last run where `explain` saw the call run.
        dtype: of the output, as `bfloat16`.
        is_causal: as computed, a recognised causal mask included.
        masked: a mask is given to the kernel, or to the dense call; one that is recognised as causal or open is not.
        thresholds: one mapping for all heads, or one per head; empty if dense.
        pattern: `sdpa`, `mha`, `softmax`, `opaque`, `not_attention`.
        source: `file:line` in user code.
        requested: dense because the user asked for it.
        threshold_source: who set the thresholds: `rule NAME` (rules.py), `policy`, `profile` or `attached profile`;
            None if dense. What is attached may change from call to call; `thresholds` then holds what `explain` ran
            with, else nothing.
        predictor: the one the thresholds belong to; None if dense.
        bucket: the lengths this variant was compiled for, as `1024 or more`; `at run time` where the operator decides.
        expected_density: what a profile measured, or `topk`; None where only a run can tell.
        variant: how many variants of the call's code torch had compiled with this one; it keeps
            torch.compiler.config.recompile_limit of them.
        density: share of the visible tiles that were computed, from `explain`'s run: the mean over calls, batch and
            heads; None if not measured.
        pv_skipped: share of the computed tiles whose P V product was skipped; None if not measured.
        head_densities: density of each query head, the mean over calls and batch; None if not measured.
        calls: how often it ran in `explain`'s run; None where nothing ran.
        dense_ms, sparse_ms: milliseconds that all its calls took together, each run on its own tensors as
            F.scaled_dot_product_attention, and as rewritten, prediction and quantization included. sparse_ms is None if
            it stayed dense; both are None if it was not timed.
    """

    name: str
    rewritten: bool
    reason: str | None
    q_len: int | str | None = None
    k_len: int | str | None = None
    heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    is_causal: bool | None = None
    masked: bool | None = None
    thresholds: tuple[dict[str, float | None], ...] = ()
    pattern: str = "sdpa"
    source: str = ""
    requested: bool = False
    density: float | None = None
    pv_skipped: float | None = None
    threshold_source: str | None = None
    predictor: str | None = None
    bucket: str | None = None
    expected_density: float | None = None
    variant: int | None = None
    head_densities: tuple[float, ...] | None = None
    calls: int | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def change(self) -> str | None:
        """What to change to have a dense call rewritten; None if `reason` says so itself, or there is none."""
        return None if self.reason is None else what_to_change(self.reason)


@dataclass(frozen=True)
class Report:
    """Every attention call of a compile: `print(report)` is a table, `report.to_json()` the same as JSON.

    Attributes:
        sites: one entry per call; a call that ran both ways has two.
        notes: what a reader must know besides.
        diffs: a unified diff for each graph that was changed; None unless `explain` made the report.
        tiles: by site name, bool [batch, heads, q_tiles, k_tiles] of the last call; those that `explain` was asked for.
    """

    sites: tuple[SiteReport, ...] = ()
    notes: tuple[str, ...] = field(default=())
    diffs: tuple[str, ...] | None = field(default=None, repr=False)
    tiles: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        """Sites that run `sparge::attention`."""
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def dense(self) -> tuple[SiteReport, ...]:
        """Sites that kept their original call."""
        return tuple(site for site in self.sites if not site.rewritten)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as all dense the attention part ran, by the times of this run; None if not timed.

        The sum of `dense_ms` over that of `sparse_ms`. A call that stayed dense and was timed counts in both sums with
        its dense time; what was not timed, in none. Below 1: it was slower.
        """
        timed = [site for site in self.sites if site.dense_ms is not None]
        now = sum((site.sparse_ms if site.rewritten else site.dense_ms) or 0.0 for site in timed)
        return sum(site.dense_ms or 0.0 for site in timed) / now if now > 0 else None

    def tile_map(self, site: str, head: int, batch: int = 0) -> Tensor:
        """The tiles that the kernel computed for one query head in the last call of a site, as it chose them.

        Args:
            site: a site's name; `explain(..., tile_maps=(site,))` keeps its tiles.
            head: query head, from 0.
            batch: from 0.

        Returns:
            bool [q_tiles, k_tiles], on the CPU: True where a tile of 128 queries x 64 keys was computed.

        Raises:
            KeyError: no such site, it stayed dense, or its tiles were not kept.
            ValueError: no such head or batch.
            TypeError: a head or batch that is no whole number.
        """
        if site not in self.tiles:
            raise KeyError(self._why_no_tiles(site))
        tiles = self.tiles[site]
        for what, index, size in (("batch", batch, tiles.shape[0]), ("head", head, tiles.shape[1])):
            if isinstance(index, bool) or not hasattr(index, "__index__"):
                raise TypeError(f"{what}={index!r}: must be a whole number.")
            if not 0 <= index < size:
                raise ValueError(f"{what}={index}: {site} has {size}; 0 to {size - 1} is allowed.")
        return tiles[batch, head]

    def _why_no_tiles(self, site: str) -> str:
        of_name = [one for one in self.sites if one.name == site]
        if not of_name:
            close = difflib.get_close_matches(site, [one.name for one in self.sites], n=3)
            return f"no site is named {site!r}" + (f"; did you mean {' or '.join(close)}?" if close else ".")
        if not any(one.rewritten for one in of_name):
            return f"{site} stayed dense, so every tile was computed: {of_name[0].reason}"
        return f"the tiles of {site} were not kept; explain(model, ..., tile_maps=({site!r},)) keeps them."

    def diff(self) -> str:
        """What was changed in the graphs, as unified diffs of their readable text; empty if nothing was.

        Raises:
            ValueError: the report is not one of `explain`, and holds no graphs.
        """
        if self.diffs is None:
            raise ValueError(
                "this report holds no graphs; explain(model, ...).diff() does, and "
                "TORCH_LOGS=+sparge_compile.graph_diff logs those of a compile."
            )
        return "\n".join(self.diffs)

    def plot(self, site: str | None = None, head: int = 0) -> Figure:
        """A matplotlib figure: the densities of all sites and heads, or the tile map of one head of one site.

        Raises:
            ImportError: matplotlib is not installed.
            KeyError, ValueError: as `tile_map`; ValueError too if there is no site to show.
        """
        from sparge_compile import report_plot

        return report_plot.densities(self) if site is None else report_plot.tiles(self, site, head)

    def to_json(self) -> str:
        """The report as a JSON object: `sites`, `notes`, `speedup`, `diffs`. Numbers that are not finite are null."""
        content = {
            "sites": [{**asdict(site), "change": site.change} for site in self.sites],
            "notes": self.notes,
            "speedup": self.speedup,
            "diffs": self.diffs,
        }
        return json.dumps(_finite(content), indent=1, allow_nan=False)

    def show(self, file: IO[str] | None = None) -> None:
        """Prints the table to `file` (None: the standard output), in colours if that is a terminal that has them."""
        from sparge_compile import report_text

        report_text.show(self, file)

    def __str__(self) -> str:
        from sparge_compile import report_text

        return report_text.plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from sparge_compile import report_text

        yield from report_text.rendered(self, options.max_width)


def _finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _LastReport:
    """The graphs of the most recent `torch.compile`, kept apart by the callable that it made.

    Dynamo calls the backend once per graph and once more per variant; a site compiled again replaces its line.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: weakref.ref[Any] | None = None
        self._report = Report()

    def add(self, owner: object | None, sites: Iterable[SiteReport]) -> None:
        with self._lock:
            same = owner is not None and self._owner is not None and self._owner() is owner
            before = self._report.sites if same else ()
            merged = {(site.name, site.source): site for site in (*before, *sites)}
            self._report = replace(self._report, sites=tuple(merged.values()))
            self._owner = None if owner is None else weakref.ref(owner)

    def get(self) -> Report:
        with self._lock:
            return self._report


LAST = _LastReport()


def last_report() -> Report:
    """What the most recent `torch.compile(..., backend="sparge")` that compiled anything found and did.

    Covers every graph of that compile (a model with graph breaks has several). Empty before the first.
    """
    return LAST.get()
