"""What looks like attention: enough to report it, with a reason where nothing more can be read of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import op_name
from sparge_compile.matchers.products import is_product

NOT_ATTENTION = "not_attention"

_SOFTMAXES = ("softmax", "special_softmax")
_OTHERS = {
    "log_softmax": "attention with log_softmax in place of softmax",
    "special_log_softmax": "attention with log_softmax in place of softmax",
    "sigmoid": "attention with sigmoid in place of softmax",
    "relu": "attention with relu in place of softmax",
}
_OTHER_KERNELS = re.compile(
    r"flash_attn|flash_attention|xformers|memory_efficient_attention|flex_attention|sageattn|sage_attn|varlen_attn"
)
# What may stand between the products and the softmax: operations that keep a map of scores a map of scores.
_ON_SCORES = {
    "add", "iadd", "add_", "sub", "isub", "mul", "imul", "mul_", "div", "div_", "truediv", "itruediv", "neg",
    "masked_fill", "masked_fill_", "where", "to", "float", "half", "bfloat16", "double", "type", "type_as",
    "dropout", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "clone", "detach",
    "expand", "getitem", "clamp", "maximum", "tanh", "tril", "triu", "nan_to_num", "cat", "unsqueeze", "squeeze",
    "getattr", "mT", "t", "swapaxes", "swapdims", "exp", "pad",
}  # fmt: skip
_REACH = 24


@dataclass(frozen=True)
class Reason:
    """A pattern's name and why its call stays as it is."""

    pattern: str
    text: str


def is_softmax(node: fx.Node) -> bool:
    """Is this node a softmax, in function or method form?"""
    return op_name(node) in _SOFTMAXES


def reason(node: fx.Node, parameters: set[int | None]) -> Reason | None:
    """Why this node is reported and never rewritten, or None."""
    name = op_name(node)
    if name in _OTHERS and between_products(node, parameters) and _weighs(node):
        return Reason("softmax", _OTHERS[name])
    target = _target_name(node) if node.op == "call_function" else ""
    if _OTHER_KERNELS.search(target):
        return Reason("opaque", f"already a call of another attention kernel ({target})")
    return None


def parameters(graph: fx.Graph) -> set[int | None]:
    """The memory of the graph's parameters."""
    return {dynamo.storage(n) for n in graph.nodes if isinstance(dynamo.example(n), torch.nn.Parameter)}


def between_products(node: fx.Node, parameters: set[int | None]) -> bool:
    """Does this node stand between two products of activations, all between them a map of scores?"""
    return all(_reaches(node, parameters, forward=forward) for forward in (False, True))


def _of_activations(node: fx.Node, parameters: set[int | None]) -> bool:
    """A product with a view of a parameter is a projection (a router, a classifier)."""
    return is_product(node) and not any(dynamo.storage(operand) in parameters for operand in node.all_input_nodes)


def _reaches(start: fx.Node, parameters: set[int | None], *, forward: bool) -> bool:
    example = dynamo.example(start)
    if not isinstance(example, torch.Tensor) or example.dim() < 2:
        return False
    frontier, seen = [start], {start}
    for _ in range(_REACH):
        neighbours = [n for node in frontier for n in _neighbours(node, forward)]
        if any(_of_activations(n, parameters) for n in neighbours):
            return True
        frontier = [n for n in neighbours if n not in seen and (op_name(n) in _ON_SCORES or _writes_into(n))]
        seen.update(frontier)
    return False


def _neighbours(node: fx.Node, forward: bool) -> list[fx.Node]:
    """Where a tensor's numbers go, or come from, through `x[...] = y` too."""
    if forward:
        written = [write.args[0] for write in node.users if op_name(write) == "setitem" and write.args[2] is node]
        return [*node.users, *(n for n in written if isinstance(n, fx.Node))]
    return [*node.all_input_nodes, *(n for write in _writes_into(node) for n in write.all_input_nodes[1:])]


def _writes_into(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if op_name(user) == "setitem" and user.args[0] is node]


def _weighs(node: fx.Node) -> bool:
    """Is what comes out the left side of the next product, as attention weights are?"""
    for _ in range(_REACH):
        if len(node.users) != 1 or dynamo.example(node).dim() < 3:
            return False
        (user,) = node.users
        if is_product(user):
            operands = [x for x in user.args if isinstance(x, fx.Node)]
            return operands[:1] == [node]
        node = user
    return False


def _target_name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", None) or str(node.target)
    module = getattr(node.target, "__module__", None) or ""
    return f"{module}.{name}" if module and module not in name else name
