"""Attention written out by hand: a matrix product, a softmax, a matrix product. Reported; not rewritten yet.

Also kernels of other libraries that arrive as an opaque call (flash-attn, xformers, flex_attention): a user who asks
where attention is must see them.
"""

from __future__ import annotations

import operator
import re

import torch
import torch.nn.functional as F
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name
from sparge_compile.site import AttentionSite

_SOFTMAX_FUNCTIONS = {torch.softmax, F.softmax}
_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul, torch.functional.einsum}
_PRODUCT_METHODS = {"matmul", "bmm", "baddbmm", "__matmul__", "__rmatmul__"}
_OTHER_KERNELS = re.compile(
    r"flash_attn|flash_attention|xformers|memory_efficient_attention|flex_attention|sageattn|sage_attn|varlen_attn"
)
# What may stand between the products and the softmax: operations that keep a map of scores a map of scores.
_ON_SCORES = {
    "add", "iadd", "add_", "sub", "isub", "mul", "imul", "mul_", "div", "div_", "truediv", "itruediv", "neg",
    "masked_fill", "masked_fill_", "where", "to", "float", "half", "bfloat16", "double", "type", "type_as",
    "dropout", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "clone", "detach",
    "expand", "getitem", "clamp", "maximum", "tanh", "tril", "triu", "nan_to_num", "cat", "unsqueeze", "squeeze",
}  # fmt: skip
_REACH = 12


_HAND_WRITTEN = (
    "attention written out as matmul, softmax, matmul; this release rewrites F.scaled_dot_product_attention calls only "
    "(many libraries select it with attn_implementation='sdpa')"
)
NOT_ATTENTION = "not_attention"
_NOT_OVER_KEYS = "matmul, softmax, matmul with a softmax that is not over the last dimension: this is not attention"


# Inductor's own attention pass ignores the dimension of the softmax: over queries or heads the result is wrong
# (relative L1 .15 to .99, seen on 2.13). Only this option turns that pass off, for what we found not to be attention.
KEEPS_INDUCTOR_OFF = {"pattern_matcher": False}


def is_softmax(node: fx.Node) -> bool:
    """Is this node a softmax, in function or method form?"""
    if node.op == "call_function":
        return node.target in _SOFTMAX_FUNCTIONS
    return node.op == "call_method" and node.target == "softmax"


def is_product(node: fx.Node, weights: set[int | None]) -> bool:
    """Is this node a matrix product of two activations, in function, method or operator form?

    `weights` is the memory of the parameters: a product with a view of one is a projection (a router, a classifier).
    """
    if node.op == "call_function":
        product = node.target in _PRODUCTS
    else:
        product = node.op == "call_method" and node.target in _PRODUCT_METHODS
    return product and not any(dynamo.storage(operand) in weights for operand in node.all_input_nodes)


def _weights(graph: fx.Graph) -> set[int | None]:
    return {dynamo.storage(n) for n in graph.nodes if isinstance(dynamo.example(n), torch.nn.Parameter)}


def match(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every hand-written attention and every other library's attention call, with the reason it stays as it is."""
    sites = []
    weights = _weights(gm.graph)
    for node in gm.graph.nodes:
        if is_softmax(node) and all(_reaches(node, weights, forward=forward) for forward in (False, True)):
            if _is_over_last_dim(node):
                sites.append(AttentionSite(node, "softmax", unmatched=_HAND_WRITTEN))
            else:
                sites.append(AttentionSite(node, NOT_ATTENTION, unmatched=_NOT_OVER_KEYS))
        elif node.op == "call_function" and _OTHER_KERNELS.search(_target_name(node)):
            reason = f"already a call of another attention kernel ({_target_name(node)})"
            sites.append(AttentionSite(node, "opaque", unmatched=reason))
    return sites


def _is_over_last_dim(softmax: fx.Node) -> bool:
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return dim in (-1, dynamo.example(softmax).dim() - 1)


def _reaches(softmax: fx.Node, weights: set[int | None], *, forward: bool) -> bool:
    """Is there a matrix product within reach, along nodes whose output is still a map of scores?"""
    example = dynamo.example(softmax)
    if not isinstance(example, torch.Tensor) or example.dim() < 2:
        return False
    frontier, seen = [softmax], {softmax}
    for _ in range(_REACH):
        neighbours = [n for node in frontier for n in (node.users if forward else node.all_input_nodes)]
        if any(is_product(n, weights) for n in neighbours):
            return True
        frontier = [n for n in neighbours if n not in seen and op_name(n) in _ON_SCORES]
        seen.update(frontier)
    return False


def _target_name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", None) or str(node.target)
    module = getattr(node.target, "__module__", None) or ""
    return f"{module}.{name}" if module and module not in name else name
