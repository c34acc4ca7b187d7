"""How views change which dimension of a tensor is batch, heads, queries and keys."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name
from sparge_compile.matchers.products import Unread
from sparge_compile.operands import Dims, Operand
from sparge_compile.repeated_heads import permutation

_BATCH, _HEADS = 0, 1
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")


def viewed(view: Operand, node: fx.Node) -> Operand:
    """`view` as seen in `node`, a view or permutation of its tensor.

    Dimensions of size 1 may come and go, batch and heads may become one and two again.
    """
    order = permutation(node)
    if order is not None:
        return Operand(node, _dims([None if dim is None else order.index(dim) for dim in view.dims]), view.heads)
    if op_name(node) not in _RESHAPES:
        raise Unread(f"{op_name(node)} is called with arguments that are not understood")
    return _reshaped(view, node)


def _reshaped(view: Operand, node: fx.Node) -> Operand:
    """Reshaping keeps the elements' order, so dimensions larger than 1 correspond one to one, or merge and split."""
    sizes, shape = dynamo.example(view.node).shape, dynamo.example(node).shape
    places = sorted((dim, place) for place, dim in enumerate(view.dims) if dim is not None)
    old = [(place, sizes[dim]) for dim, place in places if not dynamo.known(sizes[dim] == 1)]
    new = [dim for dim, size in enumerate(shape) if not dynamo.known(size == 1)]
    dims: list[int | None] = [None] * 4
    heads = None
    while old:
        place, size = old.pop(0)
        if place == _HEADS and view.heads is not None and len(new) > 1 and _splits(size, shape[new[0]], shape[new[1]]):
            if shape[new[1]] != view.heads:
                raise Unread("batch and heads are split into other numbers than they were merged from")
            dims[_BATCH], dims[_HEADS] = new.pop(0), new.pop(0)
        elif new and dynamo.known(shape[new[0]] == size):
            dims[place] = new.pop(0)
            heads = view.heads if place == _HEADS else heads
        elif place == _HEADS and view.dims[_BATCH] is None and len(new) > 1:
            if not _splits(size, shape[new[0]], shape[new[1]]):
                raise Unread(f"{op_name(node)} rearranges the scores")
            dims[_BATCH], dims[_HEADS] = new.pop(0), new.pop(0)
        elif place == _BATCH and old and old[0][0] == _HEADS and new and isinstance(old[0][1], int):
            heads = old.pop(0)[1]
            if not dynamo.known(shape[new[0]] == size * heads):
                raise Unread(f"{op_name(node)} rearranges the scores")
            dims[_HEADS] = new.pop(0)
        else:
            raise Unread(f"{op_name(node)} rearranges the scores")
    return Operand(node, _with_ones(view, dims, heads, len(shape), new), heads)


def _splits(size: Any, batch: Any, heads: Any) -> bool:
    return isinstance(heads, int) and dynamo.known(batch * heads == size)


def _with_ones(view: Operand, dims: list[int | None], heads: int | None, rank: int, left: list[int]) -> Dims:
    """Gives the dimensions of size 1 to what has none."""
    ones = [dim for dim in range(rank) if dim not in dims]
    free = [place for place in (2, 3, 1, 0) if dims[place] is None and not (place == _BATCH and heads is not None)]
    if left or len(ones) > len(free):
        raise Unread("the scores get more than four dimensions")
    for dim, place in zip(reversed(ones), free, strict=False):
        dims[place] = dim
    return _dims(dims)


def _dims(dims: list[int | None]) -> Dims:
    first, second, third, last = dims
    return first, second, third, last
