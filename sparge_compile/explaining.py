"""`explain`: run a model once and report every attention call.

The model is traced as `torch.compile(model, backend="sparge")` would trace it (with the default `dynamic`) and run on
the rewritten graphs, without Inductor: what is reported is what the compile does, sooner. A graph reports its sites
when it runs, so graphs that are shared or were compiled before report too. Calls that ran eagerly, outside every
compiled graph, are seen by a profiling hook that watches Python call torch's attention functions; a softmax out there
is noted, since it may be attention written out by hand. A site that ran both ways, sparse and dense, is listed twice.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx, nn

from sparge_compile import context, dynamo
from sparge_compile.attaching import attached_thresholds
from sparge_compile.backend import transform
from sparge_compile.markers import ATTACHED_SOURCE
from sparge_compile.policy import Policy, split_options
from sparge_compile.report import Report, SiteReport
from sparge_compile.watch import NONE_SEEN, OUTSIDE, Watcher, module_running, run_aside
from sparge_kernels import ops

_DENSE_AT_RUN_TIME = "the operator ran it dense: at run time there were fewer queries or keys than min_tokens, or none"


def explain(model: Callable[..., Any], *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """Runs `model(*args, **kwargs)` once, without gradients, and reports every attention call.

    Args:
        model: a module or function; compiled or not, it is left as it is. (On torch 2.11 each policy explained counts
            towards torch's limit of compiled variants; later versions keep explain's apart.)
        *args, **kwargs: what to call it with. The run has the side effects a call has (a cache is filled).
        policy: the policy to explain. None: the one in force here, on top of the `options` of a compiled model.

    Returns:
        A `Report`. Rewritten sites carry the density measured in this run, averaged over batch and heads. A site that
        ran sparse and dense, for inputs of two lengths say, is listed once as each. `notes` says what was not seen.

    Raises:
        StrictPolicyError: the policy is strict and a call cannot be rewritten.
        ProfileError: the policy's profile was made for another model.
    """
    target, options = dynamo.uncompiled(model)
    chosen = context.in_force(split_options(options)[0]) if policy is None else policy
    if chosen.enabled and chosen.profile is not None and isinstance(target, nn.Module):
        chosen.profile.check_model(target)  # here, where the warnings are heard
        chosen.profile.warn_of_missing_sites(target)
    collector = _Collector(target)
    token = _COLLECTOR.set(collector)
    try:
        with warnings.catch_warnings(), run_aside(target, _report_when_run, chosen) as compiled:
            warnings.simplefilter("ignore", UserWarning)
            with collector.watching_eager_calls():
                compiled(*args, **kwargs)
    finally:
        _COLLECTOR.reset(token)
    sites = tuple(collector.sites.values())
    return Report(sites, collector.notes or (() if sites else (NONE_SEEN,)))


def _report_when_run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A TorchDynamo backend: rewrites, and reports to the `explain` in progress whenever the graph runs."""
    sites = transform(gm, Policy())
    traced_in = module_running(sys._getframe(1))
    forward = gm.forward

    def run(*inputs: Any) -> Any:
        collector = _COLLECTOR.get()
        if collector is None:
            return forward(*inputs)
        with ops.record_stats() as records, collector.inside_graph():
            outputs = forward(*inputs)
        collector.add(_with_stats(sites, records), traced_in, module_running(sys._getframe(1)))
        return outputs

    return run


def _with_stats(sites: Sequence[SiteReport], records: Sequence[ops.StatsRecord]) -> list[SiteReport]:
    """The sites as they ran: of those rewritten, one entry if sparse, one if dense, both if calls of it differ."""
    measured = []
    for site in sites:
        of_site = [record for record in records if record.site == site.name]
        ran_sparse = [record for record in of_site if record.ran == "sparse"]
        if ran_sparse:
            density = torch.stack([record.density.mean() for record in ran_sparse]).mean().item()
            pv_skipped = torch.stack([record.pv_skipped.mean() for record in ran_sparse]).mean().item()
            measured.append(replace(site, density=density, pv_skipped=pv_skipped))
        if len(ran_sparse) < len(of_site):
            measured.append(_ran_dense(site))
        if not of_site:
            measured.append(site)
    return measured


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


class _Collector(Watcher):
    """The sites of one `explain`, by name, place in the source and how they ran, in the order they ran."""

    def __init__(self, target: Callable[..., Any]) -> None:
        super().__init__(target)
        self._target = target
        self.sites: dict[tuple[str, str, bool], SiteReport] = {}

    def add(self, sites: Sequence[SiteReport], traced_in: nn.Module | None, running: nn.Module | None) -> None:
        """Adds the sites of a graph that ran."""
        for site in sites:
            name = self.name_of(site.name, traced_in, running)
            if site.threshold_source == ATTACHED_SOURCE:
                attached = attached_thresholds(self._target, name)
                site = replace(site, thresholds=tuple(asdict(entry) for entry in attached))
            self._list(replace(site, name=name))

    def ran_outside(self, name: str, source: str, pattern: str) -> None:
        self._list(SiteReport(name, rewritten=False, reason=OUTSIDE, source=source, pattern=pattern))

    def _list(self, site: SiteReport) -> None:
        self.sites[site.name, site.source, site.rewritten] = site


_COLLECTOR: ContextVar[_Collector | None] = ContextVar("sparge_explain", default=None)
