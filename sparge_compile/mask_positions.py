"""Operations on position tensors that masks are built from: comparison for equality, differences, gathering.

Libraries tell the texts of a packed sequence apart by where the positions do not go up by one:
`torch.diff(positions, prepend=positions[:, :1] - 1) != 1`, summed up, gathered for each query and key, and compared. Of
positions that are an `arange` that is the same text everywhere, which these operations prove.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparge_compile import dynamo
from sparge_compile.mask_values import Affine, Open, Unproven

NOWHERE = Open((Affine((), 1),))
"""A boolean mask that is open nowhere."""


def difference(left: Any, right: Any) -> Affine:
    """left - right, of two integer tensors or numbers."""
    return _positions(left).plus(_positions(right), -1)


def _positions(value: Any) -> Affine:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return Affine((), value)
    if not isinstance(value, Affine):
        raise Unproven("the mask mixes index arithmetic with something else")
    return value


def equal(result: torch.Tensor, left: Any, right: Any) -> Open:
    """Open where two integer tensors are equal."""
    gap = difference(left, right)
    if any(gap.coefficients):
        return Open((gap, Affine((), 0).plus(gap, -1)))
    return _everywhere_or_nowhere(gap.offset == 0, gap.offset != 0)


def unequal(result: torch.Tensor, left: Any, right: Any) -> Open:
    """Open where two integer tensors differ: everywhere or nowhere, else it is not proven."""
    gap = difference(left, right)
    if any(gap.coefficients):
        raise Unproven("the mask is open where positions differ")
    return _everywhere_or_nowhere(gap.offset != 0, gap.offset == 0)


def _everywhere_or_nowhere(is_everywhere: Any, is_nowhere: Any) -> Open:
    if dynamo.known(is_everywhere):
        return Open()
    if dynamo.known(is_nowhere):
        return NOWHERE
    raise Unproven("the mask compares numbers that are not known")


def step(
    result: torch.Tensor, value: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> Affine:
    """`torch.diff` once, of positions whose difference is the same along the whole dimension."""
    if n != 1 or append is not None:
        raise Unproven("the mask takes differences in a way that is not understood")
    given = _positions(value).aligned(result.dim())
    place = dim % result.dim()
    slope = given.coefficients[place]
    if prepend is not None:
        start = (*given.coefficients[:place], 0, *given.coefficients[place + 1 :])
        first = Affine(start, given.offset).plus(_positions(prepend), -1)
        if any(first.coefficients) or not dynamo.known(first.offset == slope):
            raise Unproven("the mask takes differences that are not the same everywhere")
    return Affine((), slope)


def running_sum(result: torch.Tensor, value: Any, dim: int = -1) -> Affine:
    """`cumsum` of a condition that holds nowhere."""
    closed = isinstance(value, Open) and not value.additive
    if not closed or not any(not any(b.coefficients) and dynamo.known(b.offset >= 1) for b in value.bounds):
        raise Unproven("the mask counts positions in a way that is not understood")
    return Affine((), 0)


def gathered(result: torch.Tensor, value: Affine, index: Sequence[Any]) -> Affine:
    """`x[i, j]` with integer tensors i and j for each dimension of x."""
    if len(index) != len(value.coefficients):
        raise Unproven("the mask is indexed by tensors for a part of its dimensions")
    found = Affine((), value.offset)
    for slope, one in zip(value.coefficients, index, strict=True):
        at = _positions(one).aligned(result.dim())
        reach = [c * (size - 1) if c < 0 else 0 for c, size in zip(at.coefficients, result.shape, strict=True)]
        if not dynamo.known(at.offset + sum(reach) >= 0):
            raise Unproven("the mask is indexed from the end")
        found = found.plus(Affine(tuple(slope * c for c in at.coefficients), slope * at.offset))
    return found
