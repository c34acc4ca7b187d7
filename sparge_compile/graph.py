"""Small facts about FX graphs that several passes need: the name of an operation, and what is written in place."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo

# What converts a tensor to another type of floating-point number; other arguments are asked for their type only.
CONVERTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy")

# Modules whose functions name a write: by a trailing underscore, an `out` or an `inplace` argument.
_TORCH_MODULES = ("torch", "_operator", "math", "builtins")


def op_name(node: fx.Node) -> str:
    """`add` for torch.add, operator.add, Tensor.add and aten.add.Tensor alike; empty for what is no call of torch's.

    A user's operator or function may carry any name, so only torch's and Python's own are called by theirs.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, (dynamo.Operator, dynamo.OperatorPacket)):
        packet = getattr(node.target, "overloadpacket", node.target)
        return packet.__name__ if str(packet).startswith(("aten.", "prims.")) else ""
    return getattr(node.target, "__name__", "") if _is_of_torch(node.target) else ""


def _is_of_torch(function: object) -> bool:
    module = getattr(function, "__module__", None) or "torch"  # torch's C functions name no module
    return module.split(".")[0] in _TORCH_MODULES


_IN_PLACE_OPERATORS = {f"i{name.strip('_')}" for name in dir(operator) if hasattr(operator, f"__i{name.strip('_')}__")}
_IN_PLACE_NAMES = _IN_PLACE_OPERATORS | {f"__{name}__" for name in _IN_PLACE_OPERATORS}
_IN_PLACE_NAMES |= {"setitem", "delitem", "__setitem__", "__delitem__"}
_NOT_IN_PLACE = ("and_", "or_", "not_", "is_")


def may_write(node: fx.Node) -> bool:
    """May this call change one of its arguments? A call that is not known to leave them alone may."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, dynamo.Operator):
        return node.target._schema.is_mutable
    if isinstance(node.target, dynamo.OperatorPacket):
        return any(_writes(getattr(node.target, overload)._schema, node) for overload in node.target.overloads())
    name = op_name(node)
    if name in _IN_PLACE_NAMES or (name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE):
        return True
    if node.op == "call_method":
        return False
    if not _is_of_torch(node.target) or isinstance(node.target, dynamo.HigherOrderOperator):
        return True
    return "out" in node.kwargs or _asks_in_place(node)


def _writes(schema: Any, node: fx.Node) -> bool:
    """Would the call write if it is this overload? An `out` must be given for that."""
    written = (a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return any(not argument.kwarg_only or argument.name in node.kwargs for argument in written)


def _asks_in_place(node: fx.Node) -> bool:
    """`F.relu(x, True)` and `F.relu(x, inplace=True)` alike."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    place = _place_of_inplace(node.target)
    return place is not None and place < len(node.args) and node.args[place] is not False


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """Which argument of a function is `inplace`, None for what has none; asking takes a third of a millisecond."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a C function; none of torch's has such a parameter
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def written_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that share memory with something that may be written in place anywhere in the graph.

    Memory is told apart by the storage of the fake tensors, which views, aliases among the inputs and aliases made in
    ways nobody thought of all share.
    """
    written = writers(graph)
    return {node for node in graph.nodes if dynamo.storage(node) in written}


def writers(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The calls that may write in place to each memory (`dynamo.storage`), in graph order."""
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if not may_write(node) or _fills_fresh_memory(node):
            continue
        for storage in {dynamo.storage(argument) for argument in _targets(node)}:
            if storage is not None:
                found.setdefault(storage, []).append(node)
    return found


def tensors_between(outputs: Iterable[fx.Node], leaves: Collection[fx.Node], most: int) -> set[fx.Node]:
    """The tensors that these are computed from, themselves included and `leaves` not; about `most` end the search."""
    found: set[fx.Node] = set()
    pending = list(outputs)
    while pending and len(found) <= most:
        node = pending.pop()
        if node not in found and node not in leaves and isinstance(dynamo.example(node), torch.Tensor):
            found.add(node)
            pending.extend(node.all_input_nodes[:1] if op_name(node) in CONVERTS else node.all_input_nodes)
    return found


def writers_before(last: fx.Node, nodes: Collection[fx.Node], writing: Mapping[int, list[fx.Node]]) -> set[fx.Node]:
    """What may write, before `last`, to memory that one of these nodes made, through whatever view.

    A view of what is not among the nodes is left to whoever knows when that is read.
    """
    made = {
        dynamo.storage(node) for node in nodes if dynamo.storage(node) not in map(dynamo.storage, node.all_input_nodes)
    }
    return {writer for storage in made if storage is not None for writer in writing.get(storage, ()) if writer < last}


_CREATE = {"zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like"}
_CREATE |= {"new_zeros", "new_ones", "new_full", "new_empty"}


def _fills_fresh_memory(node: fx.Node) -> bool:
    """`torch.zeros_like(x).masked_fill_(...)`: nobody ever sees what was there before, so it is no write."""
    if op_name(node) != "masked_fill_" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    fresh = node.args[0]
    return op_name(fresh) in _CREATE and "out" not in fresh.kwargs and list(fresh.users) == [node]


def _targets(node: fx.Node) -> list[fx.Node]:
    """What a call that may write may write to: a method or operator to its first argument, others to any."""
    name = op_name(node)
    in_first = node.op == "call_method" or name in _IN_PLACE_NAMES
    first = node.args[0] if in_first and node.args and "out" not in node.kwargs else None
    return [first] if isinstance(first, fx.Node) else node.all_input_nodes


def written_after_a_read(node: fx.Node, last: fx.Node) -> bool:
    """May what `node` holds be written between the first call that reads it and `last`?"""
    storage = dynamo.storage(node)
    first = min((user for user in node.users if not may_write(user)), default=node)
    return any(
        storage in [dynamo.storage(argument) for argument in _targets(writer)]
        for writer in node.graph.nodes
        if may_write(writer) and first < writer < last
    )


def is_over_last_dimension(node: fx.Node, of: fx.Node) -> bool:
    """Is the dimension that a softmax or a sum names, by position, `dim` or `axis`, the last of the tensor `of`?"""
    dimension: Any = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    if isinstance(dimension, (list, tuple)) and len(dimension) == 1:
        dimension = dimension[0]
    example = dynamo.example(of)
    return dimension == -1 or (isinstance(example, torch.Tensor) and dimension == example.dim() - 1)


# Methods that change a tensor's shape or strides in place: what was recorded for it no longer is what the call saw.
_RESHAPES_IN_PLACE = {"transpose_", "t_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "set_"}
_RESHAPES_IN_PLACE |= {"resize_", "resize_as_"}


RESHAPED_IN_PLACE = "a tensor of the call changes its shape or strides in place (transpose_, squeeze_, ...)"
"""Why such a call stays dense."""


def reshaped_in_place(node: fx.Node) -> bool:
    """Does a later call change this tensor's shape or strides in place?"""
    return any(op_name(user) in _RESHAPES_IN_PLACE for user in node.users)


# Nodes between which attention does not have its plain meaning: a kernel the user chose, or a functorch transform.
_CHOSEN_KERNEL = "the model chooses an attention kernel itself with torch.nn.attention.sdpa_kernel"
_SWITCHED_KERNEL = "the model switches attention kernels itself with torch.backends.cuda.enable_..._sdp"
_BLOCKERS = {
    "_sdpa_kernel": _CHOSEN_KERNEL,
    "_sdpa_kernel_variadic": _CHOSEN_KERNEL,
    "enable_flash_sdp": _SWITCHED_KERNEL,
    "enable_mem_efficient_sdp": _SWITCHED_KERNEL,
    "enable_math_sdp": _SWITCHED_KERNEL,
    "enable_cudnn_sdp": _SWITCHED_KERNEL,
    "_vmap_increment_nesting": "the graph is inside torch.vmap",
    "_grad_increment_nesting": "the graph computes gradients with torch.func",
    "_jvp_increment_nesting": "the graph computes gradients with torch.func",
}


def blocker(graph: fx.Graph) -> str | None:
    """Why no call of this graph may be rewritten, or None."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in _BLOCKERS:
            return _BLOCKERS[op_name(node)]
    return None
