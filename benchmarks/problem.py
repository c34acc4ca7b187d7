"""The attention call that every peer of `benchmarks/attention.py` gets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sparge_kernels.masks import causal_tiles
from sparge_kernels.thresholds import NEVER_SKIP, Thresholds
from workloads import smooth_field

ROW = 128  # tokens in a row of the field

ONE_TILE = 1e-6
"""A topk so small that every row of tiles keeps one, and under causal its diagonal tiles."""


@dataclass(frozen=True)
class Problem:
    """q, k, v: [1, heads, tokens, head_dim] of one dtype, contiguous.

    topk: share of the tiles of each row to keep. precision: "int8" or "none", the sparse kernel's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool
    precision: str
    topk: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def thresholds(self) -> Thresholds:
        """What keeps `topk` of the tiles and nothing else: every tile is predictable, stage 2 is off."""
        return Thresholds(topk=self.topk, cdf=1.0, similarity=-1.0, pv=NEVER_SKIP)

    @property
    def dense_flops(self) -> float:
        """Operations of the two products if nothing is skipped but, under causal, the future."""
        batch, heads, tokens, head_dim = self.q.shape
        return batch * dense_flops(tokens, heads, head_dim, self.is_causal)

    def visible_tiles(self) -> int:
        """Tiles of 128 queries x 64 keys that hold a visible pair, over all heads."""
        batch, heads, tokens, _ = self.q.shape
        hidden = causal_tiles(tokens, tokens, self.is_causal, torch.float32, self.q.device).hidden
        return batch * heads * int((~hidden).sum())


def dense_flops(tokens: int, heads: int, head_dim: int, is_causal: bool) -> float:
    """Operations of the two products of one batch entry."""
    return 4 * heads * tokens * tokens * head_dim / (2 if is_causal else 1)


def smooth_problem(
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    is_causal: bool,
    precision: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Problem:
    """A smooth field of tests/workloads, made on `device`; `tokens` is a multiple of 128."""
    rows = tokens // ROW
    height = next(h for h in (8, 4, 2, 1) if rows % h == 0)
    field = smooth_field((rows // height, height, ROW), heads=heads, head_dim=head_dim, device=device)
    q, k, v = (x.contiguous().to(dtype) for x in field)
    return Problem(q, k, v, is_causal, precision)
