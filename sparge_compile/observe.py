"""Runs a model as it is, and shows every attention call that the policy would rewrite to an observer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparge_compile.backend import decide_sites
from sparge_compile.markers import take_markers
from sparge_compile.operands import with_four_dimensions
from sparge_compile.pieces import StandsFor, copy_piece
from sparge_compile.policy import Policy
from sparge_compile.rewrite import attn_mask
from sparge_compile.search import Call
from sparge_compile.site import Claim, Decision, Refusal
from sparge_compile.site_names import module_named, split
from sparge_compile.watch import Watcher, module_running, weakly


class Observer(Watcher):
    """What happens at the sites of a run. `refused`: reason by site name, for those left alone."""

    def __init__(self, target: Callable[..., Any]) -> None:
        super().__init__(target)
        self.target = target
        self.refused: dict[str, str] = {}
        self.modules: tuple[nn.Module | None, nn.Module | None] = (None, None)  # traced in, running now

    def saw(self, site: str, call: Call) -> None:
        """A site ran, with this dense output."""

    def refuse(self, site: str, reason: str) -> None:
        self.refused[site] = reason

    def cut_off(self, site: str) -> bool:
        """Is the name not that of a module, so that calls of several modules may share it?"""
        model = self.target
        return isinstance(model, nn.Module) and module_named(model, split(site)[0]) is None

    def ran_outside(self, name: str, source: str, pattern: str, reason: str) -> None:
        self.refuse(name, f"{reason} ({source})")

    def run(self, model: Callable[..., Any], batch: Any) -> None:
        """Runs a compiled model (its backend is `observing_backend`) on one batch: its arguments, or its argument."""
        token = _OBSERVER.set(self)
        try:
            with self.watching_eager_calls():
                if isinstance(batch, (tuple, list)):
                    model(*batch)
                elif hasattr(batch, "keys"):
                    model(**batch)
                else:
                    model(batch)
        finally:
            _OBSERVER.reset(token)


_CUT_OFF = (
    "a graph break inside the module's forward cuts the call off from its module, so it is not known which that is; "
    "TORCH_LOGS=graph_breaks shows where"
)
_OBSERVER: ContextVar[Observer | None] = ContextVar("sparge_observer", default=None)


def observing_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A TorchDynamo backend: leaves every node in place and adds one that looks on after each site to be rewritten.

    Thresholds attached to modules are taken out of the graph and ignored.
    """
    take_markers(gm)
    _, outcomes = decide_sites(gm, Policy())
    refused = {site.name: outcome.reason for site, outcome in outcomes if isinstance(outcome, Refusal)}
    for _, outcome in outcomes:
        if isinstance(outcome, Decision):
            _look_on(gm.graph, outcome)
    gm.recompile()
    traced_in = weakly(module_running(sys._getframe(1)))
    forward = gm.forward

    def run(*inputs: Any) -> Any:
        observer = _OBSERVER.get()
        if observer is None:
            return forward(*inputs)
        observer.modules = (traced_in(), module_running(sys._getframe(1)))
        for site, reason in refused.items():
            observer.refuse(observer.name_of(site, *observer.modules), reason)
        with observer.inside_graph():
            return forward(*inputs)

    return run


def _look_on(graph: fx.Graph, decision: Decision) -> None:
    claim = decision.claim

    def look_on(query: Tensor, key: Tensor, value: Tensor, dense: Tensor, mask: Tensor | None) -> None:
        observer = _OBSERVER.get()
        if observer is None:
            return
        site = observer.name_of(claim.site.name, *observer.modules)
        if observer.cut_off(site):
            observer.refuse(site, _CUT_OFF)
            return
        if min(query.shape[2], key.shape[2]) < decision.min_tokens:
            observer.refuse(site, f"fewer than min_tokens={decision.min_tokens} queries or keys")
            return
        with torch.autocast(query.device.type, enabled=False):
            observer.saw(site, _call(claim, query, key, value, dense, mask))

    node, piece = claim.site.node, claim.site.piece
    stands_for: StandsFor = _itself
    with graph.inserting_after(node):
        looks = graph.call_function(look_on)
    with graph.inserting_before(looks):
        if piece is not None:  # the call itself runs too: what the model computes stays what it was
            stands_for = copy_piece(graph, piece, node, _itself, claim.output.node)
        operands = (claim.query, claim.key, claim.value, claim.output)
        tensors = [with_four_dimensions(graph, operand, stands_for(operand.node)) for operand in operands]
        looks.args = (*tensors, attn_mask(graph, claim, stands_for))


def _itself(node: fx.Node) -> fx.Node:
    return node


def _call(claim: Claim, query: Tensor, key: Tensor, value: Tensor, dense: Tensor, mask: Tensor | None) -> Call:
    query, key, value = (x.to(claim.dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if claim.scale is None else claim.scale
    return Call(query, key, value, dense, claim.is_causal, scale, claim.precision, mask)
