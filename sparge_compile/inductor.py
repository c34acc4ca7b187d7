"""Graphs that Inductor's own attention pass would make wrong.

It takes a matrix product, a softmax and a matrix product for attention whatever dimension the softmax is over (torch
2.13, relative L1 .15 to .99; 2.15 asks). It works on decomposed graphs, so every spelling of a softmax counts, and one written out as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name

KEEPS_PASS_OFF = {"pattern_matcher": False}
"""The only option of Inductor's that turns that pass off."""

_DIVISIONS = {"div", "div_", "divide", "divide_", "true_divide", "true_divide_", "truediv", "itruediv"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "imatmul", "mm"}


def misread_by_attention_pass(gm: fx.GraphModule) -> bool:
    """May this graph hold a softmax between products that is not, or not surely, over the last dimension?"""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    if sum(op_name(node) in _PRODUCTS for node in nodes) < 2:
        return False
    return any(_normalizes_other_dimension(node) for node in nodes)


def _normalizes_other_dimension(node: fx.Node) -> bool:
    name = op_name(node)
    if name.endswith(("softmax", "softmin")) and not name.endswith("log_softmax"):
        return not _is_last(_dimension(node), node)
    return name in _DIVISIONS and _divides_by_its_sum(node)


def _divides_by_its_sum(division: fx.Node) -> bool:
    """`e / e.sum(dim)` of an exponential: a softmax written out, over another dimension than the last."""
    if len(division.args) < 2 or not all(isinstance(operand, fx.Node) for operand in division.args[:2]):
        return False
    terms, total = division.args[:2]
    assert isinstance(terms, fx.Node) and isinstance(total, fx.Node)
    if op_name(total) != "sum" or total.args[:1] != (terms,) or op_name(terms) not in ("exp", "exp_"):
        return False
    return not _is_last(_dimension(total), terms)


def _dimension(node: fx.Node) -> Any:
    dimension: Any = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    if isinstance(dimension, (list, tuple)) and len(dimension) == 1:
        return dimension[0]
    return dimension


def _is_last(dimension: Any, of: fx.Node) -> bool:
    example = dynamo.example(of)
    return dimension == -1 or (isinstance(example, torch.Tensor) and dimension == example.dim() - 1)
