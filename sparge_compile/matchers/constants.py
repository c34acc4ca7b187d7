"""Numbers as a graph holds them: literals, symbolic numbers that are guarded on, and constant tensors made in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from sparge_compile import dynamo
from sparge_compile.graph import CONVERTS, op_name

_MAKES = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2, "as_tensor": 0, "new_tensor": 1}


def number(value: Any) -> int | float | None:
    """A number of the graph, guarded on if it is symbolic; None for a tensor or what may change from call to call."""
    if isinstance(value, fx.Node):
        found = dynamo.example(value)
        value = None if isinstance(found, torch.Tensor) else dynamo.specialize(found)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def factor(value: Any) -> Any:
    """A constant, or a symbolic number as it is: the claim guards on it."""
    found = dynamo.example(value) if isinstance(value, fx.Node) else None
    return found if isinstance(found, (torch.SymInt, torch.SymFloat)) else constant(value)


def constant(value: Any) -> float | None:
    """A number, or what a tensor made in the graph holds everywhere (`torch.full([], c)`), rounded as it is."""
    plain = number(value)
    if plain is not None:
        return float(plain)
    made = dynamo.example(value) if isinstance(value, fx.Node) else None
    if not isinstance(made, torch.Tensor) or not made.dtype.is_floating_point:
        return None
    found = _held(value)
    return None if found is None else rounded(found, made.dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number as a tensor of this type holds it: infinite, if it is too large."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def _held(node: fx.Node) -> float | None:
    name = op_name(node)
    if name in _MAKES:
        place = _MAKES[name]
        given = node.args[place] if len(node.args) > place else node.kwargs.get("fill_value")
        found = number(given)
        return None if found is None else float(found)
    if not node.args:
        return None
    inner = (
        constant(node.args[0])
        if name in (*CONVERTS, "clone", "detach", "sqrt") and isinstance(node.args[0], fx.Node)
        else None
    )
    if inner is None or (name == "sqrt" and inner < 0):
        return None
    return math.sqrt(inner) if name == "sqrt" else inner
