"""The tensor operations that masks are built from, on the abstract values of mask_values.py.

Every operation takes the fake tensor of its result first and returns an abstract value or raises `Unproven`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sparge_compile import dynamo
from sparge_compile.dynamo import Size
from sparge_compile.mask_indicators import evaluate_numbers
from sparge_compile.mask_positions import equal, gathered, running_sum, step, unequal
from sparge_compile.mask_values import Affine, Closed, Open, Unproven, closes, each_affine

Shape = Sequence[Size]


def _number(value: Any) -> Affine | None:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return Affine((), value)
    return None


def _affine(value: Any) -> Affine:
    found = value if isinstance(value, Affine) else _number(value)
    if found is None:
        raise Unproven("the mask mixes index arithmetic with something else")
    return found


def _arange(result: torch.Tensor, *args: Any, start: Any = 0, end: Any = None, step: Any = 1, **_: Any) -> Affine:
    if len(args) >= 2 or (args and end is not None):
        start, step = args[0], (args[2] if len(args) > 2 else step)
    first, stride = _number(start), _number(step)
    if first is None or stride is None or not isinstance(stride.offset, int) or result.dtype.is_floating_point:
        raise Unproven("the mask counts positions in a way that is not understood")
    return Affine((stride.offset,), first.offset)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _add(result: torch.Tensor, left: Any, right: Any) -> Affine | Open:
    if isinstance(left, Open) and isinstance(right, Open) and left.additive and right.additive:
        return Open(left.bounds + right.bounds, additive=True, closing=max(left.closing, right.closing))
    return _affine(left).plus(_affine(right))


def _sub(result: torch.Tensor, left: Any, right: Any) -> Affine:
    return _affine(left).plus(_affine(right), -1)


def _neg(result: torch.Tensor, value: Any) -> Affine:
    return Affine((), 0).plus(_affine(value), -1)


def _compare(result: torch.Tensor, smaller: Any, larger: Any, *, strict: bool) -> Open:
    """smaller <= larger, or smaller < larger: over integers, smaller + 1 <= larger."""
    bound = _affine(smaller).plus(_affine(larger), -1)
    return Open((Affine(bound.coefficients, bound.offset + int(strict)),))


def _both(result: torch.Tensor, left: Any, right: Any) -> Open:
    if not (isinstance(left, Open) and isinstance(right, Open)) or left.additive or right.additive:
        raise Unproven("the mask combines values that are not boolean masks")
    return Open(left.bounds + right.bounds)


def _not(result: torch.Tensor, value: Any) -> Open:
    if not isinstance(value, Open) or value.additive or len(value.bounds) != 1:
        raise Unproven("the mask negates a combination")
    (bound,) = value.bounds
    flipped = Affine((), 1).plus(bound, -1)  # not (b <= 0)  is  b >= 1  is  1 - b <= 0
    return Open((flipped,))


def _fill(result: torch.Tensor, value: Any) -> Open | Closed:
    if result.dtype == torch.bool and isinstance(value, (bool, int)) and value == 1:
        return Open()
    if result.dtype.is_floating_point and _is_zero(value):
        return Open(additive=True)
    if result.dtype.is_floating_point and closes(value, result.dtype):
        return Closed(value)
    raise Unproven("the mask is filled with a value that is neither open nor closed")


def _full(result: torch.Tensor, _size: Any, fill_value: Any, *_: Any, **__: Any) -> Open | Closed:
    return _fill(result, fill_value)


def _ones(result: torch.Tensor, *_: Any, **__: Any) -> Open | Closed:
    return _fill(result, 1)  # of booleans


def _zeros(result: torch.Tensor, *_: Any, **__: Any) -> Open | Closed:
    return _fill(result, 0)


def _triangle(result: torch.Tensor, value: Any, diagonal: Any = 0, *, lower: bool) -> Open:
    if not isinstance(diagonal, (int, torch.SymInt)):
        raise Unproven("the diagonal of a triangle is not a number")
    sign = 1 if lower else -1
    shape = (0,) * (result.dim() - 2)
    kept = Affine((*shape, -sign, sign), -sign * diagonal)  # tril: j - i - d <= 0, triu: i - j + d <= 0
    if isinstance(value, Closed):  # open where the closed triangle was cut away
        return Open((Affine((), 1).plus(kept, -1),), additive=True, closing=value.closing)
    if isinstance(value, Open) and not value.additive:
        return Open((*value.bounds, kept))
    raise Unproven("a triangle is cut out of something that is not a mask")


def _masked_fill(result: torch.Tensor, value: Any, where: Any, fill: Any) -> Open:
    if not isinstance(value, Open) or not isinstance(where, Open):
        raise Unproven("the mask fills something that is not a mask")
    if not (closes(fill, result.dtype) if value.additive else fill is False):
        raise Unproven("the mask is filled with a value that does not close it")
    bounds = value.bounds + _not(result, where).bounds
    return Open(bounds, True, max(value.closing, fill)) if value.additive else Open(bounds)


def _all_open(value: Any) -> bool:
    return _is_zero(value) or (isinstance(value, Open) and value.additive and not value.bounds)


def _closing(value: Any, dtype: torch.dtype) -> float | None:
    """The number that closes, if `value` closes everywhere."""
    number = value.closing if isinstance(value, Closed) else value
    return float(number) if closes(number, dtype) else None


def _where(result: torch.Tensor, condition: Any, yes: Any, no: Any) -> Open:
    if isinstance(condition, Open) and not condition.additive and result.dtype.is_floating_point:
        if _all_open(yes) and (closing := _closing(no, result.dtype)) is not None:
            return Open(condition.bounds, True, closing)
        if _all_open(no) and (closing := _closing(yes, result.dtype)) is not None:
            return Open(_not(result, condition).bounds, True, closing)
    raise Unproven("the mask chooses between values that are not open and closed")


def _same(result: torch.Tensor, value: Any, *_: Any, **__: Any) -> Any:
    return value


def _convert(result: torch.Tensor, value: Any, *_: Any, **__: Any) -> Any:
    """A change of dtype keeps indices and additive masks; a boolean mask must stay boolean."""
    if isinstance(value, Affine) and not result.dtype.is_floating_point and result.dtype != torch.bool:
        return value
    if isinstance(value, (Open, Closed)):
        boolean = isinstance(value, Open) and not value.additive
        if boolean and result.dtype == torch.bool:
            return value
        if isinstance(value, Open) and not boolean and result.dtype == torch.bool:
            return _not(result, Open(value.bounds))  # what is added is zero where the mask is open
        if not boolean and result.dtype.is_floating_point and closes(value.closing, result.dtype):
            return value
    raise Unproven("the mask changes its type")


def _broadcast(result: torch.Tensor, value: Any, *_: Any, **__: Any) -> Any:
    return each_affine(value, lambda a: a.aligned(result.dim()))


def _unsqueeze(result: torch.Tensor, value: Any, dim: int) -> Any:
    place = dim if dim >= 0 else result.dim() + dim

    def insert(a: Affine) -> Affine:
        c = a.aligned(result.dim() - 1).coefficients
        return Affine((*c[:place], 0, *c[place:]), a.offset)

    return each_affine(value, insert)


def _getitem(result: torch.Tensor, value: Any, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if isinstance(value, Affine) and any(isinstance(item, Affine) for item in items):
        return gathered(result, value, items)
    return each_affine(value, lambda a: _index(a, items, result.dim()))


def _index(a: Affine, items: tuple[Any, ...], rank: int) -> Affine:
    """Indexing by None, Ellipsis, integers and slices that start at a known place."""
    added = sum(item is None for item in items)
    dropped = sum(isinstance(item, int) for item in items)
    a = a.aligned(rank - added + dropped)  # the rank before indexing
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items = (*items, Ellipsis)
    out: list[int] = []
    offset, place = a.offset, 0
    for item in items:
        if item is None:
            out.append(0)
        elif item is Ellipsis:
            span = len(a.coefficients) - taken
            out.extend(a.coefficients[place : place + span])
            place += span
        elif isinstance(item, (slice, int)):
            start = item.start if isinstance(item, slice) else item
            if start is not None and not (isinstance(start, (int, torch.SymInt)) and dynamo.known(start >= 0)):
                raise Unproven("the mask is indexed from the end")
            if isinstance(item, slice) and item.step not in (None, 1):
                raise Unproven("the mask is indexed with a step")
            offset = offset + a.coefficients[place] * (start or 0)
            if isinstance(item, slice):
                out.append(a.coefficients[place])
            place += 1
        else:
            raise Unproven("the mask is indexed by data")
    return Affine(tuple(out), offset)


def _slice(result: torch.Tensor, value: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    whole = (slice(None),) * (dim % result.dim())
    return _getitem(result, value, (*whole, slice(start, end, step)))


def _transpose(result: torch.Tensor, value: Any, first: int, second: int) -> Any:
    def swap(a: Affine) -> Affine:
        c = list(a.aligned(result.dim()).coefficients)
        c[first], c[second] = c[second], c[first]
        return Affine(tuple(c), a.offset)

    return each_affine(value, swap)


def _swapped(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda result, left, right: operation(result, right, left)


_less = partial(_compare, strict=False)
_strictly_less = partial(_compare, strict=True)

# By the name of the operation, whatever its spelling (function, method, operator, aten).
_TABLE: dict[str, Callable[..., Any]] = {
    "arange": _arange,
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "neg": _neg,
    "le": _less,
    "lt": _strictly_less,
    "ge": _swapped(_less),
    "gt": _swapped(_strictly_less),
    "eq": equal,
    "__eq__": equal,  # what TorchDynamo of torch 2.11 writes for ==
    "ne": unequal,
    "__ne__": unequal,
    "diff": step,
    "cumsum": running_sum,
    "and_": _both,
    "__and__": _both,
    "bitwise_and": _both,
    "logical_and": _both,
    "invert": _not,
    "__invert__": _not,
    "bitwise_not": _not,
    "logical_not": _not,
    "ones": _ones,
    "ones_like": _ones,
    "new_ones": _ones,
    "zeros": _zeros,
    "zeros_like": _zeros,
    "new_zeros": _zeros,
    "full": _full,
    "full_like": _full,
    "tril": partial(_triangle, lower=True),
    "triu": partial(_triangle, lower=False),
    "masked_fill": _masked_fill,
    "masked_fill_": _masked_fill,
    "where": _where,
    "to": _convert,
    "bool": _convert,
    "int": _convert,
    "long": _convert,
    "float": _convert,
    "half": _convert,
    "bfloat16": _convert,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "expand": _broadcast,
    "expand_as": _broadcast,
    "broadcast_to": _broadcast,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "getitem": _getitem,
    "__getitem__": _getitem,
    "slice": _slice,
}


def evaluate(name: str, result: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The abstract value of one operation.

    Args:
        name: the operation's name (`graph.op_name`).
        result: the fake tensor it computes; only shape and dtype are read.
        args, kwargs: its arguments, tensors replaced by their abstract values.

    Raises:
        Unproven: the operation, or this use of it, is not understood.
    """
    value = evaluate_numbers(name, result, args, kwargs, evaluate)
    if value is not None:
        return each_affine(value, lambda a: _normalized(a, result.shape))
    operation = _TABLE.get(name)
    if operation is None:
        raise Unproven(f"the mask goes through {name}, which is not understood")
    try:
        inspect.signature(operation).bind(result, *args, **kwargs)
    except TypeError:
        raise Unproven(f"the mask uses {name} with arguments that are not understood") from None
    value = operation(result, *args, **kwargs)
    if isinstance(value, Affine) and result.dtype != torch.int64:
        raise Unproven(f"the mask counts in {result.dtype}, which may wrap around")
    return each_affine(value, lambda a: _normalized(a, result.shape))


def _normalized(a: Affine, shape: Shape) -> Affine:
    """Full rank, and coefficient 0 where there is only coordinate 0: such a dimension may be broadcast later."""
    a = a.aligned(len(shape))
    pairs = zip(a.coefficients, shape, strict=True)
    return Affine(tuple(0 if isinstance(n, int) and n == 1 else c for c, n in pairs), a.offset)
