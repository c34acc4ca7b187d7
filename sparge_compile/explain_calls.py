"""The attention calls of one `explain`, as they run: what each did, how long it took, and what that adds up to."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, fx, nn

from sparge_compile.attaching import attached_thresholds
from sparge_compile.markers import ATTACHED_SOURCE
from sparge_compile.matchers.sdpa import is_sdpa
from sparge_compile.report import SiteReport
from sparge_compile.site import AttentionSite
from sparge_compile.watch import Watcher
from sparge_kernels import ops

_OF_THE_MODELS_OWN = (
    "Not listed: {} of sparge_compile.attention, made by the model itself; with return_stats=True it tells what it did."
)
_DENSE_AT_RUN_TIME = "the operator ran it dense: at run time there were fewer queries or keys than min_tokens, or none"


class Collector(Watcher):
    """The sites of one `explain`, by name, place in the source and how they ran, in the order they ran."""

    def __init__(self, target: Callable[..., Any], timing: bool, tile_maps: Sequence[str]) -> None:
        super().__init__(target)
        self.diffs: dict[str, None] = {}  # in order
        self.tiles: dict[str, Tensor] = {}
        self.rewrote_what_needs_gradients = False  # in a graph that ran
        self._target = target
        self._timer = ops.CallTimer() if timing else None
        self._tile_maps = tile_maps
        self._dense_ms: dict[str, float] = {}  # of the calls of the graph that runs
        self._calls: dict[tuple[str, str, bool], list[SiteReport]] = {}
        self._of_the_models_own = 0  # calls of sparge.attention

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """One entry for all calls of a site that ran one way."""
        return tuple(map(_together, self._calls.values()))

    @property
    def unmatched_patterns(self) -> list[str]:
        """Of `tile_maps`, those that no kept map is for."""
        return [pattern for pattern in self._tile_maps if not fnmatch.filter(self.tiles, pattern)]

    @property
    def notes(self) -> tuple[str, ...]:
        count = self._of_the_models_own
        if not count:
            return super().notes
        return (*super().notes, _OF_THE_MODELS_OWN.format("1 call" if count == 1 else f"{count} calls"))

    @contextlib.contextmanager
    def graph_runs(
        self, sites: Sequence[SiteReport], diff: str, traced_in: nn.Module | None, running: nn.Module | None
    ) -> Iterator[None]:
        """While a graph with these sites runs; reports them afterwards.

        `traced_in`, `running`: the module that the graph was traced in, and the one that runs it.
        """

        def name_of(site: str) -> str:
            return self.name_of(site, traced_in, running)

        def keeps_tiles(site: str) -> bool:
            return any(fnmatch.fnmatchcase(name_of(site), pattern) for pattern in self._tile_maps)

        self._dense_ms.clear()
        with ops.record_stats(keeps_tiles, self._timer) as records, self.inside_graph():
            yield
        if diff:
            self.diffs[diff] = None
        self.tiles.update({name_of(record.site): record.tiles for record in records if record.tiles is not None})
        listed = {site.name for site in sites}
        self._of_the_models_own += sum(record.site not in listed for record in records)
        for site in _as_they_ran(sites, records, self._dense_ms):
            name = name_of(site.name)
            if site.threshold_source == ATTACHED_SOURCE:
                attached = attached_thresholds(self._target, name)
                site = replace(site, thresholds=tuple(asdict(entry) for entry in attached))
            self._list(replace(site, name=name))

    def time_dense(self, site: str, call: Callable[[], Any], tensors: Sequence[Tensor]) -> None:
        """Times a call that stays dense, in the graph that runs."""
        times = None if self._timer is None else self._timer((call,), tensors)
        if times is not None:
            self._dense_ms[site] = times[0]

    def ran_outside(self, name: str, source: str, pattern: str, reason: str) -> None:
        self._list(SiteReport(name, rewritten=False, reason=reason, source=source, pattern=pattern, calls=1))

    def _list(self, site: SiteReport) -> None:
        self._calls.setdefault((site.name, site.source, site.rewritten), []).append(site)


def watch_dense_calls(
    gm: fx.GraphModule,
    outcomes: Sequence[tuple[AttentionSite, SiteReport]],
    collector: Callable[[], Collector | None],
) -> None:
    """Lets the calls of scaled_dot_product_attention that stay dense in a rewritten graph be timed as it runs.

    Not those with dropout: another run of them would draw random numbers.
    """
    timed = False
    for site, report in outcomes:
        node = site.node
        if not report.rewritten and node.graph is gm.graph and is_sdpa(node) and site.dropout_p == 0:
            node.target, timed = _timed(node.target, report.name, collector), True
    if timed:
        gm.recompile()


def _timed(function: Any, site: str, collector: Callable[[], Collector | None]) -> Callable[..., Any]:
    def attention(*args: Any, **kwargs: Any) -> Any:
        output, listening = function(*args, **kwargs), collector()
        if listening is not None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            listening.time_dense(site, lambda: function(*args, **kwargs), tensors)
        return output

    return attention


def _as_they_ran(
    sites: Sequence[SiteReport], records: Sequence[ops.StatsRecord], dense_ms: dict[str, float]
) -> list[SiteReport]:
    """The sites of a graph as they ran: of those rewritten, one entry per call, sparse or dense."""
    measured = []
    for site in sites:
        of_site = [record for record in records if record.site == site.name]
        measured += [_measured(site if record.ran == "sparse" else _ran_dense(site), record) for record in of_site]
        if not of_site:
            measured.append(replace(site, calls=1, dense_ms=dense_ms.get(site.name)))
    return measured


def _measured(site: SiteReport, record: ops.StatsRecord) -> SiteReport:
    q_len, k_len = record.lengths
    site = replace(site, calls=1, dense_ms=record.dense_ms, sparse_ms=record.sparse_ms, q_len=q_len, k_len=k_len)
    if not site.rewritten:
        return site
    return replace(
        site,
        density=record.density.mean().item(),
        pv_skipped=record.pv_skipped.mean().item(),
        head_densities=tuple(record.density.mean(0).tolist()),
    )


def _ran_dense(site: SiteReport) -> SiteReport:
    return replace(
        site,
        rewritten=False,
        reason=_DENSE_AT_RUN_TIME,
        thresholds=(),
        threshold_source=None,
        predictor=None,
        expected_density=None,
    )


def _together(calls: Sequence[SiteReport]) -> SiteReport:
    """The last of these calls of one site, with the times of all and the mean of what they computed."""
    last = replace(
        calls[-1],
        calls=len(calls),
        dense_ms=_sum([call.dense_ms for call in calls]),
        sparse_ms=_sum([call.sparse_ms for call in calls]),
    )
    if last.density is None:
        return last
    of_heads = [call.head_densities or () for call in calls]
    alike = [densities for densities in of_heads if len(densities) == len(of_heads[-1])]
    return replace(
        last,
        density=_mean([call.density for call in calls]),
        pv_skipped=_mean([call.pv_skipped for call in calls]),
        head_densities=tuple(map(_mean, zip(*alike, strict=True))),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """None if one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
