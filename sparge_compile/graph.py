"""Small facts about FX graphs that several passes need: the name of an operation, and what is written in place."""

from __future__ import annotations

import operator

import torch
from torch import fx

_IN_PLACE_OPERATORS = {
    operator.setitem,
    operator.delitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
}


def op_name(node: fx.Node) -> str:
    """`add` for torch.add, operator.add, Tensor.add and aten.add.Tensor alike; empty for what is not a call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return getattr(node.target, "__name__", "")


def writes_in_place(node: fx.Node) -> bool:
    """May this call change one of its arguments?"""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads())
    if node.target in _IN_PLACE_OPERATORS or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    name = op_name(node)
    return name.endswith("_") and name not in ("and_", "or_", "not_", "is_")


def written_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose storage may be written in place anywhere in the graph.

    A write reaches what its argument is a view of, so the walk goes back along first arguments: views take their
    base there. It may flag nodes that are copies; it misses none that the matchers look through.
    """
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if writes_in_place(node):
            pending = list(node.all_input_nodes)
            while pending:
                reached = pending.pop()
                if reached in written:
                    continue
                written.add(reached)
                pending.extend(_may_be_viewed_by(reached))
    return written


def _may_be_viewed_by(node: fx.Node) -> list[fx.Node]:
    if op_name(node) in ("broadcast_tensors", "meshgrid"):
        return node.all_input_nodes
    return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []


# Nodes between which attention does not have its plain meaning: a kernel the user chose, or a functorch transform.
_BLOCKERS = {
    "_sdpa_kernel": "the model chooses an attention kernel itself with torch.nn.attention.sdpa_kernel",
    "_sdpa_kernel_variadic": "the model chooses an attention kernel itself with torch.nn.attention.sdpa_kernel",
    "_vmap_increment_nesting": "the graph is inside torch.vmap",
    "_grad_increment_nesting": "the graph computes gradients with torch.func",
    "_jvp_increment_nesting": "the graph computes gradients with torch.func",
}


def blocker(graph: fx.Graph) -> str | None:
    """Why no call of this graph may be rewritten, or None."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in _BLOCKERS:
            return _BLOCKERS[op_name(node)]
    return None
