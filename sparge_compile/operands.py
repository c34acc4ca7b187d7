"""Tensors of a call in the order the operator takes: [batch, heads, tokens, head_dim], whatever order the model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.dynamo import Size

Dims = tuple[int | None, int | None, int | None, int | None]


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, seen with four dimensions.

    Attributes:
        node: the tensor.
        dims: for batch, heads, tokens and head_dim (of a mask: batch, heads, queries and keys) the dimension of `node`
            that it is; None for one of size 1 that `node` does not have. Every dimension of `node` appears once.
        heads: if given, the dimension that `dims` names for the heads holds batch x heads, of which so many are heads;
            `dims` names none for the batch then.
    """

    node: fx.Node
    dims: Dims = (0, 1, 2, 3)
    heads: int | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions that `node` has, in the order of the four."""
        return tuple(dim for dim in self.dims if dim is not None)

    @property
    def missing(self) -> tuple[int, ...]:
        """Which of the four `node` does not have."""
        merged = 0 if self.heads is None else 1
        return tuple(place for place, dim in enumerate(self.dims) if dim is None and place >= merged)

    @property
    def shape(self) -> tuple[Size, Size, Size, Size]:
        """The four sizes."""
        sizes = dynamo.example(self.node).shape
        first, second, third, last = (1 if dim is None else sizes[dim] for dim in self.dims)
        return (first, second, third, last) if self.heads is None else (second // self.heads, self.heads, third, last)


def keeps_digits(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Does every number of the first type exist in the second?"""
    return narrow.is_floating_point and wide.is_floating_point and torch.promote_types(narrow, wide) == wide


def aligned_right(node: fx.Node) -> Operand | None:
    """A tensor of up to four dimensions as broadcasting sees it; None for one of more."""
    rank = dynamo.example(node).dim()
    first, second, third, last = ((None,) * (4 - rank) + tuple(range(rank)))[:4]
    return Operand(node, (first, second, third, last)) if rank <= 4 else None


def with_four_dimensions(graph: fx.Graph, operand: Operand, node: fx.Node) -> fx.Node:
    """Nodes that give `node`, which stands for the operand's own, its four dimensions. A view.

    Detached: a call is claimed only if its output needs no gradient, which a no_grad region inside the graph may be the
    reason of, and the operator refuses inputs that need one where grad mode is on.
    """
    if dynamo.example(node).requires_grad:
        node = method(graph, node, "detach")
    if operand.order != tuple(sorted(operand.order)):
        node = method(graph, node, "permute", operand.order)
    if operand.heads is not None:
        node = method(graph, node, "unflatten", 0, (-1, operand.heads))
    for place in operand.missing:
        node = method(graph, node, "unsqueeze", place)
    return node


def as_in(graph: fx.Graph, operand: Operand, node: fx.Node) -> fx.Node:
    """The reverse: nodes that give the four-dimensional `node` the dimensions of the operand's own. A view."""
    for place in reversed(operand.missing):
        node = method(graph, node, "squeeze", place)
    if operand.heads is not None:
        node = method(graph, node, "flatten", 0, 1)
    inverse = tuple(operand.order.index(dim) for dim in range(len(operand.order)))
    return node if inverse == tuple(sorted(inverse)) else method(graph, node, "permute", inverse)


def memory_order(operand: Operand) -> list[int]:
    """The four dimensions from the slowest to the fastest in the memory of the operand's node, missing ones first."""
    physical = dynamo.physical_layout(dynamo.example(operand.node))
    places = [place for dim in physical for place in _places(operand, operand.dims.index(dim))]
    return [*operand.missing, *places]


def _places(operand: Operand, place: int) -> tuple[int, ...]:
    return (0, 1) if place == 1 and operand.heads is not None else (place,)


def method(graph: fx.Graph, tensor: fx.Node, name: str, *args: Any) -> fx.Node:
    """A new call of a tensor's method, its fake result computed."""
    return call(graph, getattr(torch.Tensor, name), tensor, *args)


def call(graph: fx.Graph, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call of a function, its fake result computed. Methods of tensors become method calls."""
    named = getattr(function, "__name__", "")
    if getattr(torch.Tensor, named, None) is function:
        node = graph.call_method(named, args, kwargs)
    else:
        node = graph.call_function(function, args, kwargs)
    known_args, known_kwargs = fx.node.map_arg((args, kwargs), dynamo.example)
    with torch.no_grad():
        dynamo.set_example(node, function(*known_args, **known_kwargs))
    return node
