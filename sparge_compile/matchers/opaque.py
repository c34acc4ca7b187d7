"""An attention site inside an opaque call: what the matchers of such calls share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from sparge_compile.matchers import sdpa
from sparge_compile.pieces import NotWrittenOut, Writer
from sparge_compile.site import NEEDS_GRADIENT, AttentionSite

RETURNS_WEIGHTS = (
    "the call returns the attention weights and they are used; the kernel never forms them (call it with "
    "need_weights=False)"
)


def site_of(
    writer: Writer,
    node: fx.Node,
    expected: Any,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    empty_rows: Literal["zero", "nan"] = "zero",
) -> AttentionSite:
    """The site of an opaque call that computes what `function` does with these arguments.

    Args:
        writer: of this graph.
        node: the call.
        expected: a fake of its only, or first, result.
        function: calls scaled_dot_product_attention once.
        arguments: nodes of the graph and constants.
        empty_rows: what the opaque call gives a query that has no key, as `AttentionSite.empty_rows`.
    """
    if isinstance(expected, torch.Tensor) and expected.requires_grad:
        return AttentionSite(node, "mha", unmatched=NEEDS_GRADIENT)
    try:
        piece = writer.write_out(node, expected, function, arguments)
    except NotWrittenOut as reason:
        return AttentionSite(node, "mha", unmatched=f"the opaque call could not be written out: {reason}")
    found = sdpa.match(piece.module)
    if len(found) != 1:
        return AttentionSite(node, "mha", unmatched=f"the opaque call holds {len(found)} attention calls")
    return replace(found[0], node=node, pattern="mha", piece=piece, empty_rows=empty_rows)
