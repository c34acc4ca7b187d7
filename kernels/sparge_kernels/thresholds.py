"""What decides which tiles an attention head computes, and how that travels through an operator.

An operator schema carries numbers, not objects: `pack` flattens thresholds into the `float[]` argument of
`sparge::attention` and `unpack` is its inverse. Thresholds belong to the tile geometry given here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Q_TILE = 128
K_TILE = 64

PREDICTORS = ("clusters", "sparge")
DEFAULT_PREDICTOR = "clusters"
"""Stage 1 by rows and clusters (clusters.py), or by tile means, as in the paper (arXiv 2502.18137)."""

PV_DROP_BUDGET = 0.01
"""Largest share of its softmax mass that stage 2 may take from a row under the default `pv` (eps)."""

NEVER_SKIP = -1e30
"""A `pv` no score gap can be below: stage 2 is off. Finite, because schemas and JSON carry it."""

_NONE = 0.0  # outside the range of topk and of pv, so it can stand for None
FIELDS = 4  # numbers an entry: topk, cdf, similarity, pv


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of one query head (arXiv 2502.18137, section 3).

    topk: share of the predictable tiles to keep, in (0, 1]; when set it replaces `cdf`.
    cdf: predicted softmax mass that remains, in (0, 1] (the paper's tau): of the mean query of a tile ("sparge"), of
        every row ("clusters").
    similarity: least self-similarity of a tile that may be predicted, in [-1, 1] (theta); "clusters" asks it of K only.
    pv: score gap in nats below which P V of a tile is skipped, negative (lambda); None is the certificate,
        ln(PV_DROP_BUDGET / number of keys of the call). `NEVER_SKIP` turns stage 2 off.
    """

    topk: float | None
    cdf: float
    similarity: float
    pv: float | None

    def __post_init__(self) -> None:
        if self.topk is not None:
            _require("topk", self.topk, 0 < self.topk <= 1, "(0, 1], or None")
        _require("cdf", self.cdf, 0 < self.cdf <= 1, "(0, 1]")
        _require("similarity", self.similarity, -1 <= self.similarity <= 1, "[-1, 1]")
        if self.pv is not None:
            _require("pv", self.pv, -math.inf < self.pv < 0, "(-inf, 0), or None")

    def skip_below(self, keys: int) -> float:
        """Stage 2's lambda in nats for a call with `keys` keys."""
        if self.pv is not None:
            return self.pv
        return math.log(PV_DROP_BUDGET / max(keys, 1))


def _require(field: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"threshold {field}={value!r} is out of range: it must lie in {allowed}.")


def pack(thresholds: Sequence[Thresholds]) -> list[float]:
    """Row-major (topk, cdf, similarity, pv) per entry; one entry for all heads, or one per query head."""
    return [
        float(number)
        for entry in thresholds
        for number in (
            _NONE if entry.topk is None else entry.topk,
            entry.cdf,
            entry.similarity,
            _NONE if entry.pv is None else entry.pv,
        )
    ]


def check_count(values: Sequence[float], heads: int) -> None:
    """ValueError unless `values` holds one entry, or one per query head."""
    if len(values) not in (FIELDS, FIELDS * heads):
        raise ValueError(
            f"thresholds has {len(values)} numbers; {FIELDS} (one entry for all heads) or {FIELDS * heads} "
            f"(one entry for each of {heads} query heads) are allowed. Build them with thresholds.pack()."
        )


@functools.lru_cache(maxsize=1024)
def unpack(values: tuple[float, ...], heads: int) -> list[Thresholds]:
    """One `Thresholds` per query head; ValueError on a wrong count or a number out of range."""
    check_count(values, heads)
    entries = [_entry(values[start : start + FIELDS]) for start in range(0, len(values), FIELDS)]
    return entries * heads if len(entries) == 1 else entries


def _entry(numbers: Sequence[float]) -> Thresholds:
    topk, cdf, similarity, pv = numbers
    return Thresholds(
        topk=None if topk == _NONE else topk,
        cdf=cdf,
        similarity=similarity,
        pv=None if pv == _NONE else pv,
    )
