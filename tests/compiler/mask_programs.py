"""Random programs that build attention masks, as nested tuples, and the torch code they stand for.

An index program gives integers, a mask program booleans, an additive program floats, each of [rows, columns].
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Program = tuple[Any, ...]
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
_COMPARE["!="] = operator.ne
_AND = {"&": operator.and_, "logical_and": torch.logical_and, "bitwise_and": torch.bitwise_and}
_NOT = {"~": operator.invert, "logical_not": torch.logical_not}
_LOWEST = {"inf": -math.inf, "min": torch.finfo(torch.float32).min}
_DTYPES = {"int64": torch.int64, "int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8}

_small = st.integers(-3, 3)
_positions = st.one_of(
    st.tuples(st.just("rows"), st.integers(0, 2)),
    st.tuples(st.just("columns"), st.integers(0, 2)),
    st.tuples(st.just("number"), _small),
    st.tuples(st.just("gather"), _small, st.integers(-1, 2)),
    st.tuples(st.just("steps"), st.integers(-2, 1)),
)
indices = st.recursive(
    _positions,
    lambda inner: st.one_of(
        st.tuples(st.just("add"), inner, inner),
        st.tuples(st.just("sub"), inner, inner),
        st.tuples(st.just("negate"), inner),
        st.tuples(st.just("cast"), inner, st.sampled_from(sorted(_DTYPES))),
    ),
    max_leaves=3,
)
_rows_and_columns = st.sampled_from(
    [("compare", op, ("columns", 0), ("rows", 0)) for op in ("<=", "<")]
    + [("compare", op, ("rows", 0), ("columns", 0)) for op in (">=", ">")]
    + [("compare", "<=", ("sub", ("columns", 0), ("rows", 0)), ("number", 0)), ("ones",)]
)
_ends = st.tuples(st.sampled_from(["rows", "columns"]), st.integers(0, 1))
_casts = st.tuples(st.just("cast"), _ends, st.sampled_from(sorted(_DTYPES)))
_differences = st.tuples(
    st.just("compare"), st.sampled_from(sorted(_COMPARE)), st.tuples(st.just("sub"), _casts, _casts), _positions
)
masks = st.recursive(
    st.one_of(
        _rows_and_columns,
        _differences,
        st.tuples(st.just("compare"), st.sampled_from(sorted(_COMPARE)), indices, indices),
        st.tuples(st.just("texts"), st.integers(-2, 1), st.integers(0, 1)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("and"), st.sampled_from(sorted(_AND)), inner, inner),
        st.tuples(st.just("or"), inner, inner),
        st.tuples(st.just("not"), st.sampled_from(sorted(_NOT)), inner),
        st.tuples(st.just("tril"), inner, _small),
        st.tuples(st.just("triu"), inner, _small),
        st.tuples(st.just("close"), inner, inner),
        st.tuples(st.just("cut"), inner, st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("select"), inner, st.integers(0, 1)),
        st.tuples(st.just("transpose"), inner),
        st.tuples(st.just("stretch"), inner),
    ),
    max_leaves=4,
)
additives = st.one_of(
    st.tuples(st.just("where"), masks, st.booleans(), st.sampled_from(sorted(_LOWEST))),
    st.tuples(st.just("fill"), masks, st.sampled_from(sorted(_LOWEST))),
    st.tuples(st.just("triangle"), _small, st.booleans()),
    st.tuples(st.just("sum"), masks, masks),
)
programs = st.tuples(
    st.one_of(masks, masks, additives), st.sampled_from(["plain", "4d", "batch", "ellipsis", "float32"])
)


def build(program: Program, rows: int, columns: int) -> Tensor:
    """The mask of a whole program: [rows, columns] with leading dimensions of size 1 or 2."""
    inner, wrapping = program
    mask = (
        additive(inner, rows, columns)
        if inner[0] in ("where", "fill", "triangle", "sum")
        else mask_of(inner, rows, columns)
    )
    if wrapping == "4d":
        return mask[None, None]
    if wrapping == "batch":
        return mask.unsqueeze(0).unsqueeze(0).expand(2, 1, rows, columns)
    if wrapping == "ellipsis":
        return mask[None, ..., None, :, :]
    return mask.to(torch.float32) if wrapping == "float32" and mask.dtype != torch.bool else mask.contiguous()


def index(program: Program, rows: int, columns: int) -> Any:
    kind = program[0]
    if kind == "rows":
        return torch.arange(program[1], program[1] + rows)[:, None]
    if kind == "columns":
        return torch.arange(columns).unsqueeze(0) + program[1]
    if kind == "number":
        return program[1]
    if kind == "gather":
        return (torch.arange(columns + 3) + program[1])[torch.arange(columns)[None] + program[2]]
    if kind == "steps":
        return torch.diff(torch.arange(columns)[None], prepend=torch.arange(1)[None] + program[1])
    left = index(program[1], rows, columns)
    if kind == "negate":
        return -left
    if kind == "cast":
        return left.to(_DTYPES[program[2]]) if isinstance(left, Tensor) else left
    right = index(program[2], rows, columns)
    return left + right if kind == "add" else left - right


def mask_of(program: Program, rows: int, columns: int) -> Tensor:
    """bool [rows, columns]"""
    kind = program[0]
    if kind == "ones":
        return torch.ones(rows, columns, dtype=torch.bool)
    if kind == "texts":
        breaks = index(("steps", program[1]), rows, columns) != 1
        return (breaks.cumsum(-1) == program[2]).expand(rows, columns)
    if kind == "compare":
        left, right = (index(side, rows, columns) for side in program[2:])
        if not isinstance(left, Tensor) and not isinstance(right, Tensor):
            left = torch.full((rows, columns), left)
        return _COMPARE[program[1]](left, right).expand(rows, columns)
    if kind == "and":
        return _AND[program[1]](mask_of(program[2], rows, columns), mask_of(program[3], rows, columns))
    if kind == "or":
        return mask_of(program[1], rows, columns) | mask_of(program[2], rows, columns)
    if kind == "not":
        return _NOT[program[1]](mask_of(program[2], rows, columns))
    if kind == "cut":
        return mask_of(program[1], rows + program[2], columns + program[3])[program[2] :, program[3] :]
    if kind == "transpose":
        return mask_of(program[1], columns, rows).transpose(0, 1)
    value = mask_of(program[1], rows, columns)
    if kind == "tril":
        return value.tril(program[2])
    if kind == "triu":
        return torch.triu(value, diagonal=program[2])
    if kind == "close":
        return value.masked_fill(mask_of(program[2], rows, columns), False)
    if kind == "select":
        return value[None].expand(2, rows, columns)[program[2]]
    return value[:1].expand(rows, columns) if kind == "stretch" else value


def additive(program: Program, rows: int, columns: int) -> Tensor:
    """float [rows, columns]: 0 where open, minus infinity or the lowest float where closed"""
    kind = program[0]
    if kind == "triangle":
        closed = torch.full((rows, columns), -math.inf)
        return closed.tril(program[1]) if program[2] else torch.triu(closed, diagonal=program[1])
    value = mask_of(program[1], rows, columns)
    if kind == "where":
        closed = torch.full((rows, columns), _LOWEST[program[3]])
        return torch.where(value, 0.0, closed) if program[2] else torch.where(value, closed, torch.zeros(rows, columns))
    if kind == "fill":
        return torch.zeros(rows, columns).masked_fill(value, _LOWEST[program[2]])
    zeros = torch.zeros(rows, columns)
    return zeros.masked_fill(value, -math.inf) + zeros.masked_fill(mask_of(program[2], rows, columns), -math.inf)
