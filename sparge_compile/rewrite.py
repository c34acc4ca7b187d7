"""Graph edits for decided sites, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name, written_nodes
from sparge_compile.operands import as_in, call, memory_order, method, with_four_dimensions
from sparge_compile.pieces import copy_piece, replace_first_result
from sparge_compile.site import Claim, Decision, Mask
from sparge_kernels.thresholds import pack

_Made = dict[Any, tuple[fx.Node | None, bool]]
"""What `_one_mask` gave, by what it is made of."""

_NEGATIONS = ("logical_not", "bitwise_not", "invert", "inv", "__invert__")


def rewrite(gm: fx.GraphModule, decisions: Sequence[Decision]) -> None:
    """Replaces the node of each decided site by `sparge::attention`, in place, and recompiles the module.

    What only the dense call used (its mask, repeated keys and values) is left: Inductor drops dead nodes, and knows
    which of them have side effects.
    """
    replaced: dict[fx.Node, fx.Node] = {}
    made: _Made = {}
    written = written_nodes(gm.graph) if any(decision.claim.masks for decision in decisions) else set()
    for decision in decisions:
        steady = decision.claim.site.piece is None and _is_steady(decision.claim.masks, written)
        if steady:
            masks = tuple(_without_negation(mask, written) for mask in decision.claim.masks)
            decision = replace(decision, claim=replace(decision.claim, masks=masks))
        _rewrite_site(gm.graph, decision, replaced, made if steady else None)
    if decisions:
        gm.graph.lint()
        gm.recompile()


def _is_steady(masks: Sequence[Mask], written: set[fx.Node]) -> bool:
    """Are the masks the same wherever in the graph they are read?"""
    return not any(mask.operand.node in written for mask in masks)


def _without_negation(mask: Mask, written: set[fx.Node]) -> Mask:
    """The mask read from what it negates, if that is the same wherever it is read."""
    node = mask.operand.node
    source = node.args[0] if op_name(node) in _NEGATIONS and len(node.all_input_nodes) == 1 and node.args else None
    if not isinstance(source, fx.Node) or source in written or dynamo.example(source).dtype != torch.bool:
        return mask
    return _without_negation(Mask(replace(mask.operand, node=source), not mask.hides), written)


def _rewrite_site(graph: fx.Graph, decision: Decision, replaced: dict[fx.Node, fx.Node], made: _Made | None) -> None:
    """`replaced` maps the nodes of earlier sites, which may be this one's inputs, to what stands for them now."""
    claim = decision.claim
    node, piece = claim.site.node, claim.site.piece

    def stands_for(operand: fx.Node) -> fx.Node:
        return replaced.get(operand, operand)

    with graph.inserting_before(node):
        if piece is None:
            replacement = attend(graph, decision, stands_for, made=made)
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
    made: _Made | None = None,
) -> fx.Node:
    """New nodes that compute a decided site, and the last of them, which has the dimensions of the site's output.

    Args:
        graph: where to insert, at its insert point.
        decision: what to compute.
        stands_for: the node of `graph` for each node of the claim.
        operator: what takes the operator's arguments.
        made: the masks of earlier calls, for those that are the same wherever they are read; None: make them anew.
    """
    claim, table = decision.claim, decision.table
    query, key, value = (
        _cast(graph, with_four_dimensions(graph, operand, stands_for(operand.node)), claim.dtype)
        for operand in (claim.query, claim.key, claim.value)
    )
    mask, hides = _one_mask(graph, claim, stands_for, made)
    numbers = {} if table is None else {"threshold_table": method(graph, stands_for(table), "view", torch.float64)}
    output = call(
        graph,
        operator,
        query,
        key,
        value,
        **({} if mask is None else {"attn_mask": mask, "mask_hides": hides, "empty_rows": claim.site.empty_rows}),
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
    return as_in(graph, claim.output, output)


def attn_mask(graph: fx.Graph, claim: Claim, stands_for: Callable[[fx.Node], fx.Node]) -> fx.Node | None:
    """New nodes that make the masks of a claim one, four-dimensional, boolean if all of them are; None for no mask."""
    mask, hides = _one_mask(graph, claim, stands_for, None)
    return call(graph, torch.logical_not, mask) if mask is not None and hides else mask


def _one_mask(
    graph: fx.Graph,
    claim: Claim,
    stands_for: Callable[[fx.Node], fx.Node],
    made: _Made | None,
) -> tuple[fx.Node | None, bool]:
    """(`attn_mask`, does its True hide?); from `made` where layers share it."""
    operands = tuple((stands_for(x.operand.node), x.operand.dims, x.operand.heads, x.hides) for x in claim.masks)
    known = {} if made is None else made
    if (operands, claim.dtype) not in known:
        known[operands, claim.dtype] = _combined(graph, claim, stands_for)
    return known[operands, claim.dtype]


def _combined(graph: fx.Graph, claim: Claim, stands_for: Callable[[fx.Node], fx.Node]) -> tuple[fx.Node | None, bool]:
    """One mask of all, and does its True hide? Inductor computes booleans slowly, so what all hides is not negated."""
    hides = all(mask.hides for mask in claim.masks if _is_boolean(mask))
    combine = torch.logical_or if hides else torch.logical_and
    boolean, added = None, None
    for mask in claim.masks:
        one = with_four_dimensions(graph, mask.operand, stands_for(mask.operand.node))
        if not _is_boolean(mask):
            one = _cast(graph, one, claim.dtype)
            added = one if added is None else call(graph, torch.add, added, one)
            continue
        one = call(graph, torch.logical_not, one) if mask.hides != hides else one
        boolean = one if boolean is None else call(graph, combine, boolean, one)
    if added is None:
        return boolean, hides and boolean is not None
    if boolean is not None:
        hidden = boolean if hides else call(graph, torch.logical_not, boolean)
        added = method(graph, added, "masked_fill", hidden, -math.inf)
    return added, False


def _is_boolean(mask: Mask) -> bool:
    return dynamo.example(mask.operand.node).dtype == torch.bool


def _cast(graph: fx.Graph, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast the call computed in the autocast dtype; the operator takes its inputs as they come."""
    return tensor if dynamo.example(tensor).dtype == dtype else method(graph, tensor, "to", dtype)
