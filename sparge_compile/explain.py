"""`explain`: run a model once and report every attention call.

The model is traced as `torch.compile(model, backend="sparge")` would trace it (with the default `dynamic`) and run on
the rewritten graphs, without Inductor: what is reported is what the compile does, sooner. A graph reports its sites
when it runs, so graphs that are shared or were compiled before report too. Calls that ran eagerly, outside every
compiled graph, are seen by a profiling hook that watches Python call the attention function.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparge_compile import context, dynamo
from sparge_compile.attach import attached_thresholds
from sparge_compile.backend import transform
from sparge_compile.markers import ATTACHED_SOURCE
from sparge_compile.policy import Policy, split_options
from sparge_compile.report import Report, SiteReport
from sparge_kernels import ops

_OUTSIDE = "the call ran outside every compiled graph, after a graph break; TORCH_LOGS=graph_breaks shows where"
_NOT_WATCHED = "Calls outside compiled graphs are not listed: another profiler is active in this thread."


def explain(model: Callable[..., Any], *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """Runs `model(*args, **kwargs)` once, without gradients, and reports every attention call.

    Args:
        model: a module or function; compiled or not, it is left as it is. (On torch 2.11 each policy explained counts
            towards torch's limit of compiled variants; later versions keep explain's apart.)
        *args, **kwargs: what to call it with. The run has the side effects a call has (a cache is filled).
        policy: the policy to explain. None: the one in force here, on top of the `options` of a compiled model.

    Returns:
        A `Report`. Rewritten sites carry the density measured in this run, averaged over batch and heads.

    Raises:
        StrictPolicyError: the policy is strict and a call cannot be rewritten.
    """
    target, options = dynamo.uncompiled(model)
    chosen = context.in_force(split_options(options)[0]) if policy is None else policy
    collector = _Collector(target)
    token = _COLLECTOR.set(collector)
    try:
        with (
            torch.no_grad(),
            dynamo.not_compiled_in_place(target),
            dynamo.unwrapped_backend_errors(),
            warnings.catch_warnings(),
            context.rewriting(chosen),
            dynamo.aside(target, _report_when_run) as compiled,
            collector.watching_eager_calls(),
        ):
            warnings.simplefilter("ignore", UserWarning)
            compiled(*args, **kwargs)
    finally:
        _COLLECTOR.reset(token)
    return Report(tuple(collector.sites.values()), collector.notes)


def _report_when_run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A TorchDynamo backend: rewrites, and reports to the `explain` in progress whenever the graph runs."""
    sites = transform(gm, Policy())
    traced_in = _module_running(sys._getframe(1))
    forward = gm.forward

    def run(*inputs: Any) -> Any:
        collector = _COLLECTOR.get()
        if collector is None:
            return forward(*inputs)
        with ops.record_stats() as records, collector.inside_graph():
            outputs = forward(*inputs)
        collector.add(_with_stats(sites, records), traced_in, _module_running(sys._getframe(1)))
        return outputs

    return run


def _with_stats(sites: Sequence[SiteReport], records: Sequence[ops.StatsRecord]) -> list[SiteReport]:
    measured = []
    for site in sites:
        of_site = [record for record in records if record.site == site.name]
        if of_site:
            density = torch.stack([record.density.mean() for record in of_site]).mean().item()
            pv_skipped = torch.stack([record.pv_skipped.mean() for record in of_site]).mean().item()
            site = replace(site, density=density, pv_skipped=pv_skipped)
        measured.append(site)
    return measured


class _Collector:
    """The sites of one `explain`, by name and place in the source, in the order they ran."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target
        self.sites: dict[tuple[str, str], SiteReport] = {}
        self.notes: tuple[str, ...] = ()
        modules = target.named_modules() if isinstance(target, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._depth = 0  # of graphs running and compiles in progress: what Python calls there is not eager

    def add(self, sites: Sequence[SiteReport], traced_in: nn.Module | None, running: nn.Module | None) -> None:
        """Adds the sites of a graph that ran. Modules that share a graph share its trace, so names are corrected."""
        before, now = (self._names.get(module, "") if module else "" for module in (traced_in, running))
        for site in sites:
            if before and now and (site.name + ".").startswith((before + ".", before + ":")):
                site = replace(site, name=now + site.name[len(before) :])
            if site.threshold_source == ATTACHED_SOURCE:
                attached = attached_thresholds(self._target, site.name)
                site = replace(site, thresholds=tuple(asdict(entry) for entry in attached))
            self.sites[site.name, site.source] = site

    @contextlib.contextmanager
    def inside_graph(self) -> Iterator[None]:
        """While a graph runs or is compiled."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def watching_eager_calls(self) -> Iterator[None]:
        """Sees every call of the attention function that Python makes outside compiled graphs.

        A profiling hook is the only observer that changes nothing: a TorchFunctionMode alters the captured graph, and
        patching the function hides it from TorchDynamo. It is off while TorchDynamo traces and while graphs run.
        """
        if sys.getprofile() is not None:
            self.notes = (_NOT_WATCHED,)
            yield
            return
        with dynamo.compile_listeners(self._enter, self._leave):
            self._depth = 0
            sys.setprofile(self._see)
            try:
                yield
            finally:
                sys.setprofile(None)

    def _enter(self) -> None:
        self._depth += 1
        if not self.notes:
            sys.setprofile(None)

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0 and not self.notes:
            sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument is F.scaled_dot_product_attention:
            owner = _module_running(frame)
            name = frame.f_code.co_name if owner is None else self._names.get(owner) or type(owner).__name__
            source = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self.sites[name, source] = SiteReport(name, rewritten=False, reason=_OUTSIDE, source=source)


_COLLECTOR: ContextVar[_Collector | None] = ContextVar("sparge_explain", default=None)


def _module_running(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose method is on the stack."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule):
            return owner
        frame = frame.f_back
    return None
