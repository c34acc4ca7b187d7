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
    """

    node: fx.Node
    dims: Dims = (0, 1, 2, 3)

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions that `node` has, in the order of the four."""
        return tuple(dim for dim in self.dims if dim is not None)

    @property
    def missing(self) -> tuple[int, ...]:
        """Which of the four `node` does not have."""
        return tuple(place for place, dim in enumerate(self.dims) if dim is None)

    @property
    def shape(self) -> tuple[Size, Size, Size, Size]:
        """The four sizes."""
        sizes = dynamo.example(self.node).shape
        first, second, third, last = (1 if dim is None else sizes[dim] for dim in self.dims)
        return first, second, third, last


def aligned_right(node: fx.Node) -> Operand | None:
    """A tensor of up to four dimensions as broadcasting sees it; None for one of more."""
    rank = dynamo.example(node).dim()
    first, second, third, last = ((None,) * (4 - rank) + tuple(range(rank)))[:4]
    return Operand(node, (first, second, third, last)) if rank <= 4 else None


def with_four_dimensions(graph: fx.Graph, operand: Operand, node: fx.Node) -> fx.Node:
    """Nodes that give `node`, which stands for the operand's own, its four dimensions. A view."""
    if operand.order != tuple(sorted(operand.order)):
        node = method(graph, node, "permute", operand.order)
    for place in operand.missing:
        node = method(graph, node, "unsqueeze", place)
    return node


def as_in(graph: fx.Graph, operand: Operand, node: fx.Node) -> fx.Node:
    """The reverse: nodes that give the four-dimensional `node` the dimensions of the operand's own. A view."""
    for place in reversed(operand.missing):
        node = method(graph, node, "squeeze", place)
    inverse = tuple(operand.order.index(dim) for dim in range(len(operand.order)))
    return node if inverse == tuple(sorted(inverse)) else method(graph, node, "permute", inverse)


def memory_order(operand: Operand) -> list[int]:
    """The four dimensions from the slowest to the fastest in the memory of the operand's node, missing ones first."""
    physical = dynamo.physical_layout(dynamo.example(operand.node))
    return [*operand.missing, *(operand.dims.index(dim) for dim in physical)]


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
    dynamo.set_example(node, function(*known_args, **known_kwargs))
    return node
