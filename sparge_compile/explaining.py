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
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparge_compile import context, dynamo, graph_diff
from sparge_compile.backend import transform_sites
from sparge_compile.explain_calls import Collector, watch_dense_calls
from sparge_compile.policy import Policy, split_options
from sparge_compile.report import Report
from sparge_compile.watch import NONE_SEEN, module_running, run_aside, weakly


def explain(
    model: Callable[..., Any],
    *args: Any,
    policy: Policy | None = None,
    timing: bool = True,
    tile_maps: Sequence[str] = (),
    **kwargs: Any,
) -> Report:
    """Runs `model(*args, **kwargs)` once, without gradients, and reports every attention call.

    Args:
        model: a module or function; compiled or not, it is left as it is. (On torch 2.11 each policy explained counts
            towards torch's limit of compiled variants; later versions keep explain's apart.)
        *args, **kwargs: what to call it with. The run has the side effects a call has (a cache is filled). An argument
            of the model that is called as one of those below must be given by position.
        policy: the policy to explain. None: the one in force here, on top of the `options` of a compiled model.
        timing: time each rewritten call too, on its own tensors: once as the operator and once densely, as
            F.scaled_dot_product_attention with its dtype, mask (or is_causal) and number of heads, after one run of
            both to warm up for each kind of call (short calls on a CPU: the best of three). So the attention part takes
            about one dense and one sparse run longer, and the memory that a dense call takes. Calls of
            F.scaled_dot_product_attention that stay dense run once more as they are, unless they have dropout; other
            dense calls are not timed.
        tile_maps: patterns (fnmatch) of the names of sites whose tiles are kept for `Report.tile_map`: for each of
            their batches and query heads q_len * k_len / 8192 bytes.

    Returns:
        A `Report`. Rewritten sites carry the density measured in this run, averaged over batch and heads. A site that
        ran sparse and dense, for inputs of two lengths say, is listed once as each. `notes` says what was not seen.

    Raises:
        StrictPolicyError: the policy is strict and a call in a compiled graph cannot be rewritten. Calls outside all
            graphs are listed.
        ProfileError: the policy's profile was made for another model.
        TypeError: the model cannot be called, the policy is none, or tile_maps is no sequence of strings.
    """
    patterns = _patterns(tile_maps)
    if not callable(model):
        raise TypeError(f"explain({model!r}, ...): takes a module or a function, and what to call it with.")
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}: must be a sparge_compile.Policy.")
    target, options = dynamo.uncompiled(model)
    chosen = context.in_force(split_options(options)[0]) if policy is None else policy
    if chosen.enabled and chosen.profile is not None and isinstance(target, nn.Module):
        chosen.profile.check_model(target)  # here, where the warnings are heard
        chosen.profile.warn_of_missing_sites(target)
    gradients_are_on = torch.is_grad_enabled()
    collector = Collector(target, timing, patterns)
    token = _COLLECTOR.set(collector)
    try:
        with warnings.catch_warnings(), run_aside(target, _report_when_run, chosen) as compiled:
            warnings.filterwarnings("ignore", "sparge", UserWarning)  # the report says it
            with collector.watching_eager_calls():
                compiled(*args, **kwargs)
    finally:
        _COLLECTOR.reset(token)
    sites = collector.sites
    notes = [*(collector.notes or (() if sites else (NONE_SEEN,)))]
    notes += [f"tile_maps: no rewritten call has a name like {pattern!r}" for pattern in collector.unmatched_patterns]
    if gradients_are_on and collector.rewrote_what_needs_gradients:
        notes.append(_WITHOUT_GRADIENTS)
    return Report(sites, tuple(notes), tuple(collector.diffs), collector.tiles)


_WITHOUT_GRADIENTS = (
    "This was run without gradients. Where they are on, as they are here, calls that need one stay dense: run the "
    "model under torch.no_grad() or torch.inference_mode()."
)


def _patterns(tile_maps: Any) -> tuple[str, ...]:
    if isinstance(tile_maps, str):
        raise TypeError(f"tile_maps={tile_maps!r}: must be a tuple of patterns; write tile_maps=({tile_maps!r},).")
    if not isinstance(tile_maps, Iterable):
        raise TypeError(f"tile_maps={tile_maps!r}: must be a tuple of patterns such as ('blocks.0.*',).")
    patterns = tuple(tile_maps)
    if strangers := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"tile_maps holds {strangers[0]!r}: its patterns must be strings such as 'blocks.0.*'.")
    return patterns


def _report_when_run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A TorchDynamo backend: rewrites, and reports to the `explain` in progress whenever the graph runs."""
    before = graph_diff.readable(gm)
    outcomes = transform_sites(gm, Policy())
    diff = graph_diff.difference(before, graph_diff.readable(gm)) if outcomes else ""
    watch_dense_calls(gm, outcomes, _COLLECTOR.get)
    sites = [report for _, report in outcomes]
    rewrites = any(site.rewritten for site in sites)
    traced_in = weakly(module_running(sys._getframe(1)))
    forward = gm.forward

    def run(*inputs: Any) -> Any:
        collector = _COLLECTOR.get()
        if collector is None:
            return forward(*inputs)
        # Parameters are inputs of a graph. What one graph gives to the next has no gradient in this run.
        if rewrites and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            collector.rewrote_what_needs_gradients = True
        with collector.graph_runs(sites, diff, traced_in(), module_running(sys._getframe(1))):
            return forward(*inputs)

    return run


_COLLECTOR: ContextVar[Collector | None] = ContextVar("sparge_explain", default=None)
