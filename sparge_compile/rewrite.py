"""Graph edits for decided sites, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.operands import as_in, call, memory_order, method, with_four_dimensions
from sparge_compile.pieces import copy_piece, replace_first_result
from sparge_compile.site import Claim, Decision
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
    node, piece = claim.site.node, claim.site.piece

    def stands_for(operand: fx.Node) -> fx.Node:
        return replaced.get(operand, operand)

    with graph.inserting_before(node):
        if piece is None:
            replacement = attend(graph, decision, stands_for)
        else:
            write_attention = partial(attend, graph, decision)
            now = copy_piece(graph, piece, node, stands_for, claim.output.node, write_attention)
            replacement = now(piece.result)
    replacement.meta = {**node.meta, **replacement.meta}
    replaced.update(dict.fromkeys(replace_first_result(node, replacement), replacement))


def attend(
    graph: fx.Graph,
    decision: Decision,
    stands_for: Callable[[fx.Node], fx.Node],
    operator: Callable[..., torch.Tensor] = torch.ops.sparge.attention.default,
) -> fx.Node:
    """New nodes that compute a decided site, and the last of them, which has the dimensions of the site's output.

    Args:
        graph: where to insert, at its insert point.
        decision: what to compute.
        stands_for: the node of `graph` for each node of the claim.
        operator: what takes the operator's arguments.
    """
    claim, table = decision.claim, decision.table
    query, key, value = (
        _cast(graph, with_four_dimensions(graph, operand, stands_for(operand.node)), claim.dtype)
        for operand in (claim.query, claim.key, claim.value)
    )
    mask = attn_mask(graph, claim, stands_for)
    numbers = {} if table is None else {"threshold_table": method(graph, stands_for(table), "view", torch.float64)}
    output = call(
        graph,
        operator,
        query,
        key,
        value,
        **({} if mask is None else {"attn_mask": mask}),
        **numbers,
        thresholds=pack(decision.thresholds),
        is_causal=claim.is_causal,
        scale=claim.scale,
        enable_gqa=claim.enable_gqa,
        precision=claim.precision,
        predictor=decision.predictor,
        min_tokens=decision.min_tokens,
        # The output keeps the memory order the dense call had, so that a later .view() stays valid.
        layout=memory_order(claim.output),
        site=claim.site.name,
    )
    if mask is not None and claim.site.empty_rows != "zero":
        output = _with_empty_rows(graph, claim, mask, value, output)
    return as_in(graph, claim.output, output)


def _with_empty_rows(graph: fx.Graph, claim: Claim, mask: fx.Node, value: fx.Node, output: fx.Node) -> fx.Node:
    """The output with what the replaced call gives where a query may attend to nothing; the operator gives zeros."""
    if dynamo.example(mask).dtype == torch.bool:
        empty = call(graph, torch.logical_not, call(graph, torch.any, mask, -1, True))
    else:
        empty = call(graph, torch.all, call(graph, torch.eq, mask, -math.inf), -1, True)
    order = memory_order(claim.output)  # of which the operations below would not keep what is broadcast
    in_memory, rows = (method(graph, tensor, "permute", order) for tensor in (output, empty))
    if claim.site.empty_rows == "nan":
        filled = method(graph, in_memory, "masked_fill", rows, math.nan)
    else:
        mean = method(graph, value, "mean", 2, True)
        groups = dynamo.specialize(claim.query.shape[1]) // dynamo.specialize(claim.value.shape[1])
        mean = mean if groups == 1 else method(graph, mean, "repeat_interleave", groups, 1)
        filled = call(graph, torch.where, rows, method(graph, mean, "permute", order), in_memory)
    return method(graph, filled, "permute", [order.index(dim) for dim in range(4)])


def attn_mask(graph: fx.Graph, claim: Claim, stands_for: Callable[[fx.Node], fx.Node]) -> fx.Node | None:
    """New nodes that make the masks of a claim one, four-dimensional, boolean if all of them are; None for no mask."""
    attend, added = None, None
    for mask in claim.masks:
        one = with_four_dimensions(graph, mask.operand, stands_for(mask.operand.node))
        if dynamo.example(one).dtype != torch.bool:
            one = _cast(graph, one, claim.dtype)
            added = one if added is None else call(graph, torch.add, added, one)
            continue
        one = call(graph, torch.logical_not, one) if mask.hides else one
        attend = one if attend is None else call(graph, torch.logical_and, attend, one)
    if attend is not None and added is not None:
        return method(graph, added, "masked_fill", call(graph, torch.logical_not, attend), -math.inf)
    return added if attend is None else attend


def _cast(graph: fx.Graph, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast the call computed in the autocast dtype; the operator takes its inputs as they come."""
    return tensor if dynamo.example(tensor).dtype == dtype else method(graph, tensor, "to", dtype)
