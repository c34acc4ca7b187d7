"""Seeing through keys and values that were repeated for grouped-query attention before the call.

Two spellings: `x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)` and `x.repeat_interleave(n, 1)`, wherever
among the dimensions the heads are, and with the dimensions permuted between the repetition and the call. The kernel
maps query heads to key heads itself, so it can read `x`, n times less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name
from sparge_compile.operands import Operand


def unrepeat(operand: Operand, written: set[fx.Node]) -> tuple[Operand, int]:
    """(x, n) if the operand is x [B, H, S, D] with each head repeated n times in a row, else (operand, 1).

    A write in place anywhere near makes it (operand, 1): `x` may have changed since it was copied.
    """
    if operand.missing:
        return operand, 1
    permuted, chain = before_permutations(operand)
    heads = permuted.dims[1]
    assert heads is not None
    for read in (_from_expand, _from_repeat_interleave):
        found = read(permuted.node, heads)
        if found is None:
            continue
        copies, source, repeats = found
        if not written.intersection((*chain, *copies, source)):
            return Operand(source, permuted.dims), repeats
    return operand, 1


def before_permutations(operand: Operand) -> tuple[Operand, list[fx.Node]]:
    """(the tensor whose dimensions were permuted into the operand, the nodes that did)."""
    chain: list[fx.Node] = []
    while (order := permutation(operand.node)) is not None:
        chain.append(operand.node)
        first, second, third, last = (None if dim is None else order[dim] for dim in operand.dims)
        operand = Operand(operand.node.all_input_nodes[0], (first, second, third, last), operand.heads)
    return operand, chain


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Which dimension of its input each dimension of a permuted tensor is; None for what is no permutation."""
    source = node.args[0] if node.args else None
    shape = _shape(source) if isinstance(source, fx.Node) else None
    if shape is None or node.kwargs:
        return None
    rank, arguments = len(shape), node.args[1:]
    if op_name(node) == "contiguous" and not arguments:
        return tuple(range(rank))
    if (op_name(node), *arguments) in (("getattr", "mT"), ("mT",)) and rank >= 2:  # ("mT",): from torch 2.15 on
        return (*range(rank - 2), rank - 1, rank - 2)
    if op_name(node) == "t" and not arguments and rank == 2:
        return (1, 0)
    if op_name(node) == "permute" and len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        arguments = tuple(arguments[0])
    dims = [dim % rank for dim in arguments if isinstance(dim, int)]
    if op_name(node) == "permute":
        return tuple(dims) if len(dims) == len(arguments) == rank else None
    if op_name(node) not in ("transpose", "swapaxes", "swapdims") or not len(dims) == len(arguments) == 2:
        return None
    order, (left, right) = list(range(rank)), dims
    order[left], order[right] = order[right], order[left]
    return tuple(order)


def _from_expand(node: fx.Node, heads: int) -> tuple[list[fx.Node], fx.Node, int] | None:
    if op_name(node) != "reshape":
        return None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or op_name(expanded) != "expand":
        return None
    inserted = expanded.args[0]
    if not isinstance(inserted, fx.Node):
        return None
    source = inserted.args[0] if _inserts(inserted, heads + 1) else None
    if not isinstance(source, fx.Node):
        return None
    narrow, wide, result = _shape(source), _shape(expanded), _shape(node)
    if narrow is None or wide is None or result is None or (len(narrow), len(wide), len(result)) != (4, 5, 4):
        return None
    repeats = wide[heads + 1]
    if not (isinstance(narrow[heads], int) and isinstance(repeats, int)):
        return None
    before, after = narrow[:heads], narrow[heads + 1 :]
    same = _equal(wide, (*before, narrow[heads], repeats, *after))
    same = same and _equal(result, (*before, narrow[heads] * repeats, *after))
    return ([node, expanded, inserted], source, repeats) if same else None


def _inserts(node: fx.Node, place: int) -> bool:
    """`x[:, :, None]`, with or without the full slices behind it, or `x.unsqueeze(2)`, for place 2 of five."""
    name = op_name(node)
    if name == "unsqueeze":
        return len(node.args) == 2 and node.args[1] in (place, place - 5)
    if name not in ("getitem", "__getitem__"):
        return False
    full = slice(None, None, None)
    index = node.args[1]
    before = (full,) * place + (None,)
    tails = ((Ellipsis,), *((full,) * count for count in range(5 - place)))
    return isinstance(index, tuple) and index in tuple((*before, *tail) for tail in tails)


def _from_repeat_interleave(node: fx.Node, heads: int) -> tuple[list[fx.Node], fx.Node, int] | None:
    if op_name(node) != "repeat_interleave" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    narrow, result = _shape(source), _shape(node)
    if not isinstance(repeats, int) or dim not in (heads, heads - 4) or narrow is None or result is None:
        return None
    if len(narrow) != 4 or not isinstance(narrow[heads], int):
        return None
    repeated = (*narrow[:heads], narrow[heads] * repeats, *narrow[heads + 1 :])
    return ([node], source, repeats) if _equal(result, repeated) else None


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = dynamo.example(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _equal(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(dynamo.known(a == b) for a, b in zip(left, right, strict=True))
