"""`F.multi_head_attention_forward`, which is what a call of nn.MultiheadAttention is in a graph: one opaque node."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch.nn.functional as F
from torch import fx

from sparge_compile.matchers.opaque import RETURNS_WEIGHTS, site_of
from sparge_compile.pieces import Writer, first_result, only_first_is_used
from sparge_compile.site import AttentionSite

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def match(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every call of multi_head_attention_forward, written out."""
    writer = Writer()
    return [
        _site(node, writer)
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is F.multi_head_attention_forward
    ]


def _site(node: fx.Node, writer: Writer) -> AttentionSite:
    arguments = _SIGNATURE.bind(*node.args, **node.kwargs)
    arguments.apply_defaults()
    given = arguments.arguments
    empty_rows: Literal["zero", "nan"] = "zero"
    if not only_first_is_used(node):
        return AttentionSite(node, "mha", unmatched=RETURNS_WEIGHTS)
    if given["need_weights"] is not False:
        # Nobody asks for the weights, but the call forms them: by a softmax, NaN where a query has no key, and of the
        # mask alone, whatever is_causal hints at.
        given["need_weights"], empty_rows = False, "nan"
        given["is_causal"] = given["is_causal"] and given["attn_mask"] is None
    if given["training"] is False:
        given["dropout_p"] = 0.0
    return site_of(writer, node, first_result(node), _output, list(given.values()), empty_rows)


def _output(*arguments: Any) -> Any:
    return F.multi_head_attention_forward(*arguments)[0]
