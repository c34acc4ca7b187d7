"""Markers: how the thresholds attached to a module get into a graph, and to the attention calls of that module.

An attached module (see attaching.py) calls `sparge::mark_thresholds` on each of its tables when TorchDynamo traces it.
TorchDynamo makes the tables inputs of the graph and records the same module for the marker as for the attention call,
so a graph that many blocks share gets each block's own tables. For every other backend the operator does nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from sparge_compile import dynamo
from sparge_compile.matchers.naming import owner
from sparge_compile.site import AttentionSite, Decision, Refusal
from sparge_kernels.thresholds import FIELDS

ATTACHED_SOURCE = "attached profile"
PREFIX = "_sparge_thresholds_"
"""Of the buffers: int64 [entries, 4], the bits of fp64 numbers, so that no cast of the model changes them."""
STATE = "_sparge_attached"
"""Attribute of an attached module: the predictor of its thresholds. Guards ask for it where a call is traced apart from
its module's forward.
"""

_OPERATOR = "sparge::mark_thresholds"
torch.library.define(_OPERATOR, "(Tensor table, int call, str predictor) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _do_nothing(table: Tensor, call: int, predictor: str) -> None:
    return None


torch.library.impl(_OPERATOR, "default", _do_nothing)
torch.library.register_fake(_OPERATOR, _do_nothing)
mark = torch.ops.sparge.mark_thresholds.default


@dataclass(frozen=True)
class Marker:
    """One table in a graph.

    Attributes:
        owner: the module it belongs to (`naming.owner`).
        call: which attention call of the module: 1, 2, ...; 0 for its only one.
        table: int64 [entries, 4]; no entries: the profile keeps the call dense.
        predictor: the one the thresholds belong to.
    """

    owner: tuple[str, str]
    call: int
    table: fx.Node
    predictor: str


def take_markers(gm: fx.GraphModule) -> list[Marker]:
    """Removes every marker from a graph and its sub-graphs and returns those of the graph itself."""
    taken = []
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.target is mark]
        for node in nodes:
            table, call, predictor = node.args
            if module is gm:
                taken.append(Marker(owner(node), call, table, predictor))
            module.graph.erase_node(node)
        if nodes:
            module.recompile()
    return taken


def tables_of(sites: Sequence[AttentionSite], markers: Sequence[Marker]) -> dict[fx.Node, Marker | Refusal]:
    """The attached table of each site that has one, by the site's node; a `Refusal` where it is unclear which.

    A call whose module is attached never falls back to the policy's thresholds in silence. Where a call is traced
    apart from its module's forward (after a graph break), the graph is guarded on whether the module is attached.
    """
    by_owner: dict[tuple[str, str], dict[int, Marker]] = defaultdict(dict)
    for marker in markers:
        by_owner[marker.owner][marker.call] = marker
    calls = defaultdict(list)
    for site in sites:
        calls[owner(site.node)].append(site)
    found: dict[fx.Node, Marker | Refusal] = {}
    for place, of_module in calls.items():
        layer = (place[0], place[1].rpartition(".")[0])
        if place in by_owner:
            found.update(_tables_of_module(of_module, by_owner[place]))
        elif layer in by_owner and layer not in calls and all(site.other_name for site in of_module):
            found.update(_tables_of_module(of_module, by_owner[layer]))  # attached as the fast path names it
        elif dynamo.is_compiling_frame() and _is_attached(*place):
            found.update((site.node, Refusal(_CUT_OFF)) for site in of_module)
        elif dynamo.is_compiling_frame():
            passed_over = [site for site in of_module if site.node.target is dynamo.FUSED_ENCODER_LAYER]
            if passed_over and _is_attached(place[0], f"{place[1]}.self_attn".lstrip(".")):
                found.update((site.node, Refusal(_PASSED_OVER)) for site in passed_over)
    return found


_CUT_OFF = (
    "a profile is attached to the module, but the call does not see it: a graph break inside the module's forward cuts "
    "it off (TORCH_LOGS=graph_breaks shows where), or another forward took the place of the attached one, as in an "
    "unpickled model (sparge_compile.Attachment.of(model).detach(), and attach again)"
)
_PASSED_OVER = (
    "a profile is attached to the layer's self_attn, which the fast path of nn.TransformerEncoderLayer never calls; "
    "make the profile from the model as it runs here, or set torch.backends.mha.set_fastpath_enabled(False)"
)


def _is_attached(start: str, path: str) -> bool:
    """Is the module attached, although it set no marker in this graph?

    Where TorchDynamo traced the call of the module, it guards the graph on the module's forward itself.
    """
    if not path:
        return dynamo.guard_on_attribute_of_local(start, STATE)
    module = dynamo.module_in_local(start, path)
    return module is not None and STATE in vars(module)


def _tables_of_module(sites: Sequence[AttentionSite], tables: dict[int, Marker]) -> dict[fx.Node, Marker | Refusal]:
    numbers = [0] if len(sites) == 1 else list(range(1, len(sites) + 1))  # as the names of its calls end
    if not set(tables) <= set(numbers):
        named = "its only call" if 0 in tables else f"call {max(tables)} of it"
        reason = f"the profile attached to the module names {named}, and this graph has {len(sites)} of its calls"
        return {site.node: Refusal(reason) for site in sites}
    return {site.node: tables[number] for number, site in zip(numbers, sites, strict=True) if number in tables}


def with_table(decision: Decision, marker: Marker) -> Decision | Refusal:
    """The decision with an attached table in place of its thresholds; refuses a table that does not fit the call."""
    query, numbers = (dynamo.example(node) for node in (decision.claim.query.node, marker.table))
    if numbers.dtype != torch.int64 or numbers.dim() != 2 or not dynamo.known(numbers.shape[1] == FIELDS):
        return Refusal(
            f"the attached thresholds were changed to {numbers.dtype} {list(numbers.shape)} (by model.type(...)?); "
            "detach, and attach the profile again"
        )
    if numbers.device != query.device:
        return Refusal(f"the attached thresholds are on {numbers.device}, the call on {query.device}; move the module")
    entries, heads = dynamo.specialize(numbers.shape[0]), dynamo.specialize(decision.claim.query.shape[1])
    if entries == 0:
        return Refusal("the attached profile keeps it dense", requested=True)
    if entries not in (1, heads):
        return Refusal(f"the attached profile has {entries} heads for this site, the call has {heads}")
    return replace(
        decision,
        thresholds=(),
        table=marker.table,
        predictor=marker.predictor,
        source=ATTACHED_SOURCE,
        expected_density=None,
    )
