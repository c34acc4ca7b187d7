"""Abstract values of mask sub-graphs.

`Affine` is an integer tensor whose element at coordinates x is offset + sum(coefficient_d * x_d). `Open` is a mask:
open where all its bounds (`Affine <= 0`) hold, closed elsewhere; boolean, or additive with 0 and `closing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

_MOST_BOUNDS = 32


class Unproven(Exception):
    """The meaning of a mask could not be proven; the message says what stood in the way."""


@dataclass(frozen=True)
class Affine:
    """offset + sum(coefficients[d] * coordinate[d]); a dimension of size 1 always has coefficient 0."""

    coefficients: tuple[int, ...]
    offset: Any = 0

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        """self + sign * other, right-aligned as broadcasting does."""
        rank = max(len(self.coefficients), len(other.coefficients))
        mine, theirs = self.aligned(rank).coefficients, other.aligned(rank).coefficients
        summed = tuple(a + sign * b for a, b in zip(mine, theirs, strict=True))
        return Affine(summed, self.offset + sign * other.offset)

    def aligned(self, rank: int) -> Affine:
        return Affine((0,) * (rank - len(self.coefficients)) + self.coefficients, self.offset)


@dataclass(frozen=True)
class Open:
    """A mask that is open where every bound is <= 0. No bounds: open everywhere."""

    bounds: tuple[Affine, ...] = ()
    additive: bool = False
    closing: float = -math.inf

    def __post_init__(self) -> None:
        # By identity: comparing symbolic offsets would put guards on them. `m & m` in a loop doubles them otherwise.
        bounds = tuple({id(bound): bound for bound in self.bounds}.values())
        if len(bounds) > _MOST_BOUNDS:
            raise Unproven("the mask combines too many conditions")
        object.__setattr__(self, "bounds", bounds)


@dataclass(frozen=True)
class Closed:
    """A float tensor that is `closing` everywhere: minus infinity, or the lowest number of its type."""

    closing: float = -math.inf


@dataclass(frozen=True)
class Indicator:
    """A tensor of numbers: 1 where `open` is, 0 elsewhere; `negated` the other way round."""

    open: Open
    negated: bool = False


def closes(value: Any, dtype: torch.dtype) -> bool:
    """Does adding `value` in this float type close a position? The lowest number of a narrower type need not."""
    return dtype.is_floating_point and isinstance(value, (int, float)) and value <= torch.finfo(dtype).min


def each_affine(value: Any, change: Callable[[Affine], Affine]) -> Any:
    """Applies a change of coordinates to an abstract value."""
    if isinstance(value, Affine):
        return change(value)
    if isinstance(value, Open):
        return replace(value, bounds=tuple(change(b) for b in value.bounds))
    if isinstance(value, Indicator):
        return replace(value, open=each_affine(value.open, change))
    return value
