"""Operands as they were before the model merged batch and heads, or widened their type, for its own products.

Where the copy that the model made may be written in place, it is not what was copied, and stays the operand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import CONVERTS, op_name
from sparge_compile.matchers.products import Unread
from sparge_compile.operands import Operand, keeps_digits
from sparge_compile.repeated_heads import before_permutations


def heads_of(query: Operand) -> int | None:
    """The heads of queries that were given to the product with batch and heads in one dimension."""
    source = _apart(query)
    return None if source is None else dynamo.specialize(source.shape[1])


def taken_apart(operand: Operand, heads: int, query: Operand) -> Operand:
    """The operand with batch and heads apart, if it has them in one dimension."""
    total = dynamo.example(query.node).shape[query.dims[1] or 0]
    if operand.dims[0] is not None or operand.dims[1] is None or operand.heads is not None:
        return operand
    if not dynamo.known(dynamo.example(operand.node).shape[operand.dims[1]] == total):
        return operand
    return replace(operand, heads=heads)


def before_merge(operand: Operand, written: set[fx.Node]) -> Operand:
    """What was reshaped into batch x heads, before it was."""
    source = _apart(operand) if operand.heads is not None and not _copy_is_written(operand, written) else None
    return source if source is not None and source.shape[1] == operand.heads else operand


def _copy_is_written(operand: Operand, written: set[fx.Node]) -> bool:
    inner, chain = before_permutations(operand)
    return not written.isdisjoint((*chain, inner.node))


def _apart(operand: Operand) -> Operand | None:
    if operand.dims[0] is not None or operand.dims[1] is None:
        return None
    inner, _ = before_permutations(operand)
    source: Any = inner.node.args[0] if inner.node.args else None
    if op_name(inner.node) not in ("reshape", "view", "flatten") or not isinstance(source, fx.Node):
        return None
    shape, merged = dynamo.example(source).shape, dynamo.example(inner.node).shape
    if len(shape) != 4 or len(merged) != 3 or inner.dims[1] != 0 or not isinstance(shape[1], int):
        return None
    sizes = (shape[0] * shape[1], shape[2], shape[3])
    if not all(dynamo.known(a == b) for a, b in zip(sizes, merged, strict=True)):
        return None
    third, last = ((dim or 0) + 1 for dim in inner.dims[2:])
    return Operand(source, (0, 1, third, last))


def as_narrow(name: str, operand: Operand, product: torch.dtype, output: torch.dtype, written: set[fx.Node]) -> Operand:
    """The operand in a type that the output's holds whole: before it was widened, if need be.

    Autocast may have narrowed it for the product; the claim casts as autocast did.
    """
    dtype = dynamo.example(operand.node).dtype
    if keeps_digits(dtype, output) or (product == output and keeps_digits(product, dtype)):
        return operand
    found = _narrow_source(operand, output, written)
    if found is None:
        raise Unread(f"the {name} is {dtype}, the output {output}: it would lose digits")
    return found


def _narrow_source(operand: Operand, output: torch.dtype, written: set[fx.Node]) -> Operand | None:
    inner, _ = before_permutations(operand)
    node = inner.node
    source = node.args[0] if node.args and op_name(node) in CONVERTS else None
    if not isinstance(source, fx.Node) or not isinstance(dynamo.example(source), torch.Tensor):
        return None
    if _copy_is_written(operand, written):
        return None
    narrow = dynamo.example(source)
    whole = keeps_digits(narrow.dtype, output) and keeps_digits(narrow.dtype, dynamo.example(node).dtype)
    return replace(inner, node=source) if whole and narrow.device == dynamo.example(node).device else None


def before_widening(operand: Operand, output: torch.dtype, written: set[fx.Node]) -> Operand:
    """A mask before it was widened, if it is wider than the output; what was not widened is returned as it is."""
    dtype = dynamo.example(operand.node).dtype
    if dtype == torch.bool or keeps_digits(dtype, output):
        return operand
    return _narrow_source(operand, output, written) or operand
