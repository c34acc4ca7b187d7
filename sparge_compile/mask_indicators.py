"""Masks held as numbers: 1 where a condition holds, 0 elsewhere. `tril(ones(n, n)) == 0`, `(1 - mask) * lowest`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sparge_compile.graph import CONVERTS
from sparge_compile.mask_values import Indicator, Open, Unproven, closes

Evaluate = Callable[[str, torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]

_ONES = ("ones", "ones_like", "new_ones")
_CONVERTS = (*CONVERTS, "bool", "int", "long")
_MOVES = ("contiguous", "clone", "detach", "expand", "expand_as", "broadcast_to", "unsqueeze", "getitem", "__getitem__")
_TRIANGLES = ("tril", "triu")


def evaluate_numbers(
    name: str, result: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], evaluate: Evaluate
) -> Any:
    """The abstract value of an operation that makes or takes numbers 0 and 1; None if this one does not.

    Args:
        name, result, args, kwargs: as `mask_algebra.evaluate` takes them.
        evaluate: that function, for the conditions.
    """
    if name in _ONES and result.dtype != torch.bool:
        return Indicator(Open())
    first = args[0] if args else None
    if name in _CONVERTS and isinstance(first, Open) and not first.additive and result.dtype != torch.bool:
        return Indicator(first)
    given = [argument for argument in args if isinstance(argument, Indicator)]
    if not given:
        return None
    if len(given) > 1:
        raise Unproven("the mask combines numbers")
    return _of_one(name, result, args, kwargs, evaluate)


def _of_one(name: str, result: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], evaluate: Evaluate) -> Any:
    first = args[0]
    if name in _CONVERTS and isinstance(first, Indicator):
        return _condition(first, result, evaluate) if result.dtype == torch.bool else first
    if name in (*_MOVES, "transpose", *_TRIANGLES) and isinstance(first, Indicator):
        if first.negated and name in _TRIANGLES:
            raise Unproven("a triangle is cut out of a negated mask")
        return Indicator(evaluate(name, result, (first.open, *args[1:]), kwargs), first.negated)
    if kwargs or len(args) != 2:
        raise Unproven(f"the mask goes through {name} with arguments that are not understood")
    return _with_number(name, result, *args, evaluate)


def _with_number(name: str, result: torch.Tensor, left: Any, right: Any, evaluate: Evaluate) -> Any:
    mask, number = (left, right) if isinstance(left, Indicator) else (right, left)
    on_the_left = mask is left
    if not isinstance(number, (int, float)):
        raise Unproven("the mask combines numbers with something else")
    flipped = Indicator(mask.open, not mask.negated)
    # By the numbers themselves: which of 0 and 1 the comparison holds for.
    holds = _COMPARISONS.get(name.strip("_"))
    if holds is not None:
        answers = [holds(x, number) if on_the_left else holds(number, x) for x in (0, 1)]
        if answers[0] != answers[1]:
            return _condition(mask if answers[1] else flipped, result, evaluate)
    if name == "sub" and not on_the_left and number == 1:
        return flipped
    if name in ("mul", "multiply") and math.isfinite(number) and closes(number, result.dtype):  # 0 * inf is NaN
        return Open(_condition(flipped, result, evaluate).bounds, additive=True, closing=number)
    raise Unproven(f"the mask goes through {name} with {number}")


def _condition(mask: Indicator, result: torch.Tensor, evaluate: Evaluate) -> Open:
    if not mask.negated:
        return mask.open
    found = evaluate("logical_not", result, (mask.open,), {})
    assert isinstance(found, Open)
    return found


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
