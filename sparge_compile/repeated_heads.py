"""Seeing through keys and values that were repeated for grouped-query attention before the call.

Two spellings: `x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)` and `x.repeat_interleave(n, 1)`. The kernel
maps query heads to key heads itself, so it can read `x`, n times less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name


def unrepeat(node: fx.Node, written: set[fx.Node]) -> tuple[fx.Node, int]:
    """(x, n) if `node` is x [B, H, S, D] with each head repeated n times in a row, else (node, 1).

    A write in place anywhere near makes it (node, 1): `x` may have changed since it was copied.
    """
    for read in (_from_expand, _from_repeat_interleave):
        found = read(node)
        if found is None:
            continue
        chain, source, repeats = found
        if not written.intersection((*chain, source)):
            return source, repeats
    return node, 1


def _from_expand(node: fx.Node) -> tuple[list[fx.Node], fx.Node, int] | None:
    if op_name(node) != "reshape":
        return None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or op_name(expanded) != "expand":
        return None
    inserted = expanded.args[0]
    if not isinstance(inserted, fx.Node):
        return None
    source = inserted.args[0] if _inserts_dim_2(inserted) else None
    if not isinstance(source, fx.Node):
        return None
    narrow, wide, result = _shape(source), _shape(expanded), _shape(node)
    if narrow is None or wide is None or result is None or (len(narrow), len(wide), len(result)) != (4, 5, 4):
        return None
    batch, heads, tokens, dim = narrow
    repeats = wide[2]
    if not (isinstance(heads, int) and isinstance(repeats, int)):
        return None
    same = _equal(wide, (batch, heads, repeats, tokens, dim)) and _equal(result, (batch, heads * repeats, tokens, dim))
    return ([node, expanded, inserted], source, repeats) if same else None


def _inserts_dim_2(node: fx.Node) -> bool:
    """`x[:, :, None]`, with or without the full slices behind it, or `x.unsqueeze(2)`."""
    name = op_name(node)
    if name == "unsqueeze":
        return len(node.args) == 2 and node.args[1] in (2, -3)
    if name not in ("getitem", "__getitem__"):
        return False
    full = slice(None, None, None)
    index = node.args[1]
    return isinstance(index, tuple) and index in tuple(
        (full, full, None, *tail) for tail in ((), (full,), (full, full), (Ellipsis,))
    )


def _from_repeat_interleave(node: fx.Node) -> tuple[list[fx.Node], fx.Node, int] | None:
    if op_name(node) != "repeat_interleave" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    narrow, result = _shape(source), _shape(node)
    if not isinstance(repeats, int) or dim not in (1, -3) or narrow is None or result is None or len(narrow) != 4:
        return None
    batch, heads, tokens, size = narrow
    if not isinstance(heads, int) or not _equal(result, (batch, heads * repeats, tokens, size)):
        return None
    return [node], source, repeats


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = dynamo.example(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _equal(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(dynamo.known(a == b) for a, b in zip(left, right, strict=True))
