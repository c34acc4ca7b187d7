"""Graphs that Inductor's own attention pass would make wrong.

It takes a matrix product, a softmax and a matrix product for attention whatever dimension the softmax is over (torch
2.13, relative L1 .15 to .99; 2.15 asks). It works on decomposed graphs, so every spelling of a softmax counts, and one
written out as well. What cannot be told apart from such a softmax counts too: the pass only saves time.
"""

from __future__ import annotations

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import is_over_last_dimension, op_name

KEEPS_PASS_OFF = {"pattern_matcher": False}
"""The only option of Inductor's that turns that pass off."""

_CONTRACTIONS = ("matmul", "mm", "einsum", "dot", "inner")
# What hands on the numbers of an exponential, as they are or nearly.
_HANDS_ON = {"clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "view_as", "detach", "contiguous"}
_HANDS_ON |= {"getitem", "dropout", "view", "reshape", "expand", "expand_as", "mul", "add", "masked_fill", "nan_to_num"}
_FEWEST_DIMENSIONS = 3  # of scores; exponentials of frequencies and time steps have fewer
_REACH = 6


def misread_by_attention_pass(gm: fx.GraphModule) -> bool:
    """May this graph hold a softmax between products that is not, or not surely, over the last dimension?"""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    if sum(_contracts(node) for node in nodes) < 2:
        return False
    return any(_normalizes_other_dimension(node) for node in nodes)


def _contracts(node: fx.Node) -> bool:
    return any(name in op_name(node) for name in _CONTRACTIONS)


def _normalizes_other_dimension(node: fx.Node) -> bool:
    name = op_name(node)
    if name.endswith(("softmax", "softmin")) and not name.endswith("log_softmax"):
        return not is_over_last_dimension(node, node)
    example = dynamo.example(node)
    is_exponential = name in ("exp", "exp_", "exp2", "special_exp2")
    if not is_exponential or not isinstance(example, torch.Tensor) or example.dim() < _FEWEST_DIMENSIONS:
        return False
    return _summed_over_other_dimension(node)


def _summed_over_other_dimension(terms: fx.Node) -> bool:
    """Does a sum over another dimension than the last lie behind these terms? A softmax written out divides by it."""
    frontier, seen = [terms], {terms}
    for _ in range(_REACH):
        users = [user for node in frontier for user in node.users if user not in seen]
        if any(op_name(user) == "sum" and not is_over_last_dimension(user, user.all_input_nodes[0]) for user in users):
            return True
        seen.update(users)
        frontier = [user for user in users if op_name(user) in _HANDS_ON]
    return False
