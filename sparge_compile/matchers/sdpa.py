"""`F.scaled_dot_product_attention` in every spelling: three call targets, positional, keyword or mixed arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparge_compile.site import AttentionSite

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
    sites = []
    for node in gm.graph.nodes:
        if is_sdpa(node):
            bound = bind(node)
            if isinstance(bound, str):
                sites.append(AttentionSite(node, "sdpa", unmatched=bound))
            else:
                sites.append(AttentionSite(node, "sdpa", **bound))
    return sites
