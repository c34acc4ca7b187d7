"""Pieces: what an opaque call of a graph computes, as a graph of its own with the attention call inside.

nn.MultiheadAttention is one node in a TorchDynamo graph, and so is nn.TransformerEncoderLayer's fast path. A piece is
that node written out. The node itself stays as it is until its site is rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import RESHAPED_IN_PLACE, op_name, reshaped_in_place, written_nodes

_VIEWS = {"getitem", "broadcast_to", "expand", "unsqueeze", "squeeze", "view", "reshape", "transpose", "detach"}
StandsFor = Callable[[fx.Node], fx.Node]
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "fwd_source_fn_stack")


class NotWrittenOut(Exception):
    """A call could not be written out; the message says why."""


@dataclass(frozen=True)
class Piece:
    """The graph of one opaque call.

    Attributes:
        module: holds the graph; its nodes have example values of the outer graph's fake mode.
        inputs: the outer node for each placeholder.
        result: what the call returns, or the first element of it.
        written: nodes of the piece whose storage is written in place within it.
    """

    module: fx.GraphModule
    inputs: dict[fx.Node, fx.Node]
    result: fx.Node
    written: frozenset[fx.Node]

    @property
    def body(self) -> list[fx.Node]:
        """The calls, in order."""
        return [node for node in self.module.graph.nodes if node.op not in ("placeholder", "output")]


Traced = tuple[fx.GraphModule, fx.Node, frozenset[fx.Node]]


class Writer:
    """Writes out the opaque calls of one graph. Calls that differ in nothing but the numbers share one tracing."""

    def __init__(self) -> None:
        self._traced: dict[Any, Traced] = {}

    def write_out(self, node: fx.Node, expected: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> Piece:
        """The piece that stands for `node`: what `function` computes from nodes of the graph and constants.

        Raises:
            NotWrittenOut: it depends on what is not known at compile time, or does not give what is `expected`.
        """
        tensors: dict[fx.Node, torch.Tensor] = {}
        constants = [_constant_or_tensor(argument, tensors) for argument in arguments]
        if any(reshaped_in_place(tensor) for tensor in tensors):
            raise NotWrittenOut(RESHAPED_IN_PLACE)
        places = {tensor: place for place, tensor in enumerate(tensors)}
        pattern = tuple(("tensor", places[c]) if isinstance(c, fx.Node) else ("constant", c) for c in constants)
        kinds = tuple(map(type, constants))  # 1 and True are equal
        key = (function, pattern, kinds, tuple(map(_facts, tensors.values())), tuple(dynamo.autocast_regions(node)))
        if key not in self._traced:

            def on_tensors(*fakes: torch.Tensor) -> Any:
                return function(*(fakes[value] if kind == "tensor" else value for kind, value in pattern))

            self._traced[key] = _trace(node, on_tensors, list(tensors.values()))
        module, result, written = self._traced[key]
        _check_same(expected, dynamo.example(result))
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        return Piece(module, dict(zip(placeholders, tensors, strict=True)), result, written)


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that a tracing depends on."""
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tensor.dtype, tensor.device, tensor.dim(), tuple(map(dynamo.expression, sizes))


def _trace(node: fx.Node, function: Callable[..., Any], fakes: Sequence[torch.Tensor]) -> Traced:
    try:
        module = dynamo.written_out(node, function, fakes)
    except Exception as error:  # whatever tracing meets, the call runs as it is; its own error then shows by itself
        raise NotWrittenOut(f"tracing it gave {type(error).__name__}: {_first_line(error)}") from error
    if any(n.op not in ("placeholder", "call_function", "output") for n in module.graph.nodes):
        raise NotWrittenOut("it holds tensors of its own")
    written = frozenset(written_nodes(module.graph))
    if any(n.op == "placeholder" for n in written):
        raise NotWrittenOut("it writes to its inputs")
    (result,) = (n.args[0] for n in module.graph.nodes if n.op == "output")
    return module, result, written


def _constant_or_tensor(argument: Any, tensors: dict[fx.Node, torch.Tensor]) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    value = dynamo.example(argument)
    if isinstance(value, torch.Tensor):
        if not dynamo.is_plain(value):
            raise NotWrittenOut(f"{argument} is not a plain strided tensor ({type(value).__name__}, {value.layout})")
        tensors[argument] = value
        return argument
    known = dynamo.specialize(value)
    if known is None:
        raise NotWrittenOut(f"{argument} is not a constant")
    return known


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _check_same(whole: Any, written_out: Any) -> None:
    """Same tensor as far as metadata goes? Strides by the hints: which dimension is innermost is no matter of sizes."""
    if not isinstance(whole, torch.Tensor) or not isinstance(written_out, torch.Tensor):
        raise NotWrittenOut("it does not return a tensor")
    facts = [
        (x.dtype, x.device, tuple(map(dynamo.hint, x.shape)), tuple(map(dynamo.hint, x.stride())))
        for x in (whole, written_out)
    ]
    if facts[0] != facts[1]:
        raise NotWrittenOut(f"it gives {facts[0]}, written out {facts[1]}")


def copy_piece(
    graph: fx.Graph,
    piece: Piece,
    node: fx.Node,
    stands_for: StandsFor,
    attention: fx.Node,
    attend: Callable[[StandsFor], fx.Node] | None = None,
) -> StandsFor:
    """Copies a piece to the insert point of the outer graph.

    Args:
        graph: the outer graph.
        piece: to be copied.
        node: the opaque call, whose place in modules and source the copies take on.
        stands_for: what stands for a node of the outer graph now.
        attention: the node of the piece that is the attention call.
        attend: makes what takes its place, given what stands for its inputs; None: it is copied too, as the last node.

    Returns:
        what stands for a node of the piece or of the outer graph.
    """
    copies = {inner: stands_for(outer) for inner, outer in piece.inputs.items()}
    kept = {key: node.meta[key] for key in _KEPT_META if key in node.meta}

    def now(known: fx.Node) -> fx.Node:
        return copies[known] if known in copies else stands_for(known)

    for inner in piece.body:
        if inner is attention and attend is not None:
            copies[inner] = attend(now)
            copies[inner].meta = {**kept, **copies[inner].meta}
            continue
        copies[inner] = graph.node_copy(inner, now)
        copies[inner].meta = dict(kept)
        dynamo.set_example(copies[inner], dynamo.example(inner))
        if inner is attention:
            break
    return now


def first_result(node: fx.Node) -> Any:
    """The fake tensor that a call returns, or the first of several."""
    value = dynamo.example(node)
    return value[0] if isinstance(value, (tuple, list)) and value else value


def only_first_is_used(node: fx.Node) -> bool:
    """Does nothing depend on any result of a call but the first?"""
    if not isinstance(dynamo.example(node), (tuple, list)):
        return True
    return all(user.target is operator.getitem and (user.args[1] == 0 or _is_dead(user)) for user in node.users)


def _is_dead(node: fx.Node) -> bool:
    """Is this a view, or one of a view, that nothing reads? TorchDynamo leaves them in the graph."""
    return op_name(node) in _VIEWS and all(_is_dead(user) for user in node.users)


def _erase(node: fx.Node) -> None:
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def replace_first_result(node: fx.Node, replacement: fx.Node) -> list[fx.Node]:
    """Makes `replacement` the result of a call, or the first of several, and erases the call.

    Returns:
        the nodes it stands for now.
    """
    several = isinstance(dynamo.example(node), (tuple, list))
    taken = [user for user in node.users if user.args[1] == 0] if several else [node]
    for result in taken:
        result.replace_all_uses_with(replacement)
    _erase(node)
    return taken
