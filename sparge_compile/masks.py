"""What a mask sub-graph means: causal, all true, a sliding window, or data.

Libraries build the same few masks out of index arithmetic (`arange`, comparisons, `tril`, `masked_fill`, ...). The
nodes are interpreted abstractly: an integer tensor as an affine function of its coordinates, a mask as the set of
affine inequalities under which a position is open. That proves the meaning for static and for dynamic sizes alike and
allocates nothing, where evaluating a mask would cost Sq x Sk bytes during the compile. An operation outside the table
below, a tensor that comes from outside the graph, or a write in place anywhere near makes the mask data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.dynamo import Size
from sparge_compile.graph import op_name
from sparge_compile.mask_algebra import evaluate
from sparge_compile.mask_values import Affine, Open, Unproven
from sparge_compile.site import Mask

_NOTHING: Mapping[fx.Node, fx.Node] = MappingProxyType({})


@dataclass(frozen=True)
class MaskMeaning:
    """`kind` is `all_true`, `causal` (key j <= query i), `window` or `data`; `detail` says why in words."""

    kind: str
    detail: str = ""


def mask_meaning(
    mask: Mask, q_len: Size, k_len: Size, written: set[fx.Node], outer: Mapping[fx.Node, fx.Node] = _NOTHING
) -> MaskMeaning:
    """The meaning of a mask, boolean or additive, for queries i and keys j.

    Args:
        mask: of the call.
        q_len, k_len: the call's query and key counts.
        written: nodes whose storage may be written in place (`graph.written_nodes`).
        outer: what stands outside for the placeholders of a piece (`pieces.Piece.inputs`).
    """
    node = mask.operand.node
    try:
        if mask.operand.order != tuple(range(len(mask.operand.order))):
            raise Unproven("the mask's dimensions are permuted")
        value = _interpret(node, written, outer)
        if mask.hides:
            value = evaluate("logical_not", dynamo.example(node), (value,), {})
        if not isinstance(value, Open):
            raise Unproven("the mask is not a boolean or additive mask")
        return _classify(value, q_len, k_len)
    except Unproven as unproven:
        return MaskMeaning("data", str(unproven))


def _interpret(mask: fx.Node, written: set[fx.Node], outer: Mapping[fx.Node, fx.Node]) -> Any:
    """The abstract value of a node, its inputs first. Iterative: mask graphs can be deep."""
    values: dict[fx.Node, Any] = {}
    pending = [mask]
    while pending:
        node = pending[-1]
        if node in values:
            pending.pop()
            continue
        inputs = [outer[node]] if node in outer else node.all_input_nodes
        waiting = [n for n in inputs if n not in values and not _is_number(n)]
        if waiting and (node in outer or node.op in ("call_function", "call_method")):
            pending.extend(waiting)
            continue
        if node in written:
            raise Unproven("the mask is written in place")
        values[node] = values[outer[node]] if node in outer else _apply(node, values)
        pending.pop()
    return values[mask]


def _apply(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op not in ("call_function", "call_method"):
        raise Unproven("the mask depends on data")
    result = dynamo.example(node)
    if not isinstance(result, torch.Tensor):
        raise Unproven(f"the mask goes through {op_name(node)}, which is not understood")

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return dynamo.example(argument) if _is_number(argument) else values[argument]
        return argument

    args = fx.node.map_aggregate(node.args, plain)
    kwargs = fx.node.map_aggregate(node.kwargs, plain)
    name = "broadcast_to" if _adds_leading_ones(node, result) else op_name(node)
    return evaluate(name, result, args, kwargs)


def _adds_leading_ones(node: fx.Node, result: torch.Tensor) -> bool:
    """Is this a view that only puts dimensions of size 1 in front?"""
    source = node.args[0] if op_name(node) in ("view", "reshape") else None
    if not isinstance(source, fx.Node) or not isinstance(dynamo.example(source), torch.Tensor):
        return False
    shape = dynamo.example(source).shape
    added = result.dim() - len(shape)
    wanted = (*(1,) * added, *shape)
    return added >= 0 and all(dynamo.known(a == b) for a, b in zip(result.shape, wanted, strict=True))


def _is_number(node: fx.Node) -> bool:
    return isinstance(dynamo.example(node), (bool, int, float, torch.SymInt, torch.SymFloat))


def _classify(mask: Open, q_len: Size, k_len: Size) -> MaskMeaning:
    bounds = [b for b in mask.bounds if not _always_holds(b, q_len, k_len)]
    if not bounds:
        return MaskMeaning("all_true")
    if any(any(b.coefficients[:-2]) for b in bounds):
        return MaskMeaning("data", "the mask differs between batch entries or heads")
    causal = [b for b in bounds if _slopes(b) == (-1, 1) and dynamo.known(b.offset == 0)]
    if len(causal) == len(bounds):
        return MaskMeaning("causal")
    if any(_slopes(b) == (1, -1) for b in bounds):
        return MaskMeaning("window", "a sliding window")
    return MaskMeaning("data", "the mask is causal with an offset, or limits the keys")


def _slopes(bound: Affine) -> tuple[int, int]:
    padded = (0, 0, *bound.coefficients)
    return padded[-2], padded[-1]


def _always_holds(bound: Affine, q_len: Size, k_len: Size) -> bool:
    """Is `a i + b j + c <= 0` for every query i and key j? Its maximum lies in a corner."""
    if any(bound.coefficients[:-2]):
        return False
    a, b = _slopes(bound)
    largest = bound.offset + max(a, 0) * (q_len - 1) + max(b, 0) * (k_len - 1)
    return dynamo.known(largest <= 0)
