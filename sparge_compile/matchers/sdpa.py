"""`F.scaled_dot_product_attention` in every spelling: three call targets, positional, keyword or mixed arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparge_compile import dynamo
from sparge_compile.operands import Operand, aligned_right
from sparge_compile.site import AttentionSite, Mask

TARGETS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)

# The operator's own order; a call is bound to it argument by argument, so an argument we do not know is never lost.
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def is_sdpa(node: fx.Node) -> bool:
    """Is this node a scaled_dot_product_attention call?"""
    return node.op == "call_function" and node.target in TARGETS


def bind(node: fx.Node) -> dict[str, Any] | str:
    """The call's arguments by name, defaults filled in; or what is wrong with them."""
    if len(node.args) > len(_PARAMETERS):
        return f"the call has {len(node.args)} positional arguments, {len(_PARAMETERS)} are known"
    bound = dict(zip(_PARAMETERS, node.args, strict=False))
    for name, value in node.kwargs.items():
        if name not in _PARAMETERS or name in bound:
            return f"the call has an argument this release does not know: {name}"
        bound[name] = value
    missing = [name for name in _PARAMETERS[:3] if not isinstance(bound.get(name), fx.Node)]
    return f"the call's {missing[0]} is not a tensor of the graph" if missing else {**_DEFAULTS, **bound}


def match(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every scaled_dot_product_attention call."""
    return [_site(node) for node in gm.graph.nodes if is_sdpa(node)]


def _site(node: fx.Node) -> AttentionSite:
    bound = bind(node)
    if isinstance(bound, str):
        return AttentionSite(node, "sdpa", unmatched=bound)
    attn_mask = bound.pop("attn_mask")
    operands = [_operand(tensor) for tensor in (*(bound.pop(name) for name in _PARAMETERS[:3]), node)]
    mask = None if attn_mask is None else _operand(attn_mask)
    if isinstance(mask, str):
        return AttentionSite(node, "sdpa", unmatched=f"attn_mask: {mask}", **bound)
    readable = [operand for operand in operands if isinstance(operand, Operand)]
    if len(readable) < len(operands):
        reason = next(operand for operand in operands if isinstance(operand, str))
        return AttentionSite(node, "sdpa", unmatched=reason, **bound)
    query, key, value, output = readable
    masks = () if mask is None else (Mask(mask),)
    return AttentionSite(node, "sdpa", query=query, key=key, value=value, output=output, masks=masks, **bound)


def _operand(node: Any) -> Operand | str:
    """A tensor of the call, its missing dimensions in front, or why it cannot be one."""
    value = dynamo.example(node) if isinstance(node, fx.Node) else node
    if not isinstance(value, torch.Tensor):
        return f"{node} is not one tensor in the graph"
    return aligned_right(node) or f"{node} has {value.dim()} dimensions; [batch, heads, tokens, head_dim] is supported"
