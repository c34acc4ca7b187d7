"""Calls that hold a whole multi-head attention in one opaque node. Reported; not rewritten yet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from sparge_compile import dynamo
from sparge_compile.site import AttentionSite

_REASONS = {
    F.multi_head_attention_forward: "nn.MultiheadAttention is one opaque call in the graph; this release rewrites "
    "F.scaled_dot_product_attention calls only",
    dynamo.FUSED_ENCODER_LAYER: "nn.TransformerEncoderLayer took its fused fast path, one opaque call; "
    "this release rewrites F.scaled_dot_product_attention calls only",
    dynamo.FUSED_MULTI_HEAD_ATTENTION: "nn.MultiheadAttention took its fused fast path, one opaque call; this "
    "release rewrites F.scaled_dot_product_attention calls only",
}


def match(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every opaque multi-head attention call, with the reason it stays as it is."""
    return [
        AttentionSite(node, "mha", unmatched=_REASONS[node.target])
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target in _REASONS
    ]
