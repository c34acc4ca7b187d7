"""Graph edits for decided sites, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.site import Decision
from sparge_kernels.thresholds import pack


def rewrite(gm: fx.GraphModule, decisions: Sequence[Decision]) -> None:
    """Replaces the node of each decided site by `sparge::attention`, in place, and recompiles the module.

    What only the dense call used (its mask, repeated keys and values) is left: Inductor drops dead nodes, and knows
    which of them have side effects.
    """
    replaced: dict[fx.Node, fx.Node] = {}
    for decision in decisions:
        _rewrite_site(gm.graph, decision, replaced)
    if decisions:
        gm.graph.lint()
        gm.recompile()


def _rewrite_site(graph: fx.Graph, decision: Decision, replaced: dict[fx.Node, fx.Node]) -> None:
    """`replaced` maps the nodes of earlier sites, which may be this one's inputs, to what stands for them now."""
    claim = decision.claim
    node = claim.site.node
    table = decision.table
    output = dynamo.example(node)
    with graph.inserting_before(node):
        claimed = (claim.query, claim.key, claim.value)
        inputs = tuple(_cast(graph, replaced.get(x, x), claim.dtype) for x in claimed)
        # The output keeps the memory order the dense call had, so that a later .view() stays valid.
        replacement = graph.call_function(
            torch.ops.sparge.attention.default,
            inputs,
            {
                **({} if table is None else {"threshold_table": _numbers(graph, table)}),
                "thresholds": pack(decision.thresholds),
                "is_causal": claim.is_causal,
                "scale": claim.scale,
                "enable_gqa": claim.enable_gqa,
                "precision": claim.precision,
                "predictor": decision.predictor,
                "min_tokens": decision.min_tokens,
                "layout": list(dynamo.physical_layout(output)),
                "site": claim.site.name,
            },
        )
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)
    replaced[node] = replacement


def _numbers(graph: fx.Graph, table: fx.Node) -> fx.Node:
    """An attached table, int64, as the fp64 numbers whose bits it holds."""
    numbers = graph.call_method("view", (table, torch.float64))
    dynamo.set_example(numbers, dynamo.example(table).view(torch.float64))
    return numbers


def _cast(graph: fx.Graph, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast the call computed in the autocast dtype; the operator takes its inputs as they come."""
    fake = dynamo.example(tensor)
    if fake.dtype == dtype:
        return tensor
    cast = graph.call_method("to", (tensor, dtype))
    cast.meta = {key: value for key, value in tensor.meta.items() if key != "source_fn_stack"}
    dynamo.set_example(cast, fake.to(dtype))
    return cast
