"""The attention call that every peer of a benchmark gets, and the choice of what sparse ones may leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparge_compile.bench.field import smooth_field
from sparge_compile.policy import Policy
from sparge_compile.thresholds import from_policy
from sparge_kernels.masks import causal_tiles
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, NEVER_SKIP, Thresholds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROW = 128  # tokens in a row of the field


@dataclass(frozen=True)
class Choice:
    """Which tiles a sparse peer computes.

    name: in tables. density: the share of each row of tiles that is asked for, if one is. max_error, min_row_cosine:
    the largest relative L1 to dense attention and the least cosine of a row that pass; None: any does, and is shown.
    """

    name: str
    thresholds: Thresholds
    predictor: str = DEFAULT_PREDICTOR
    density: float | None = None
    max_error: float | None = None
    min_row_cosine: float | None = None

    @property
    def keeps_all(self) -> bool:
        """Nothing is left out, in neither stage."""
        return self.thresholds.topk == 1 and self.thresholds.pv == NEVER_SKIP


def share(density: float) -> Choice:
    """This share of the tiles of each row, and nothing else: every tile is predictable, stage 2 is off."""
    return Choice(f"{density:g}", Thresholds(topk=density, cdf=1.0, similarity=-1.0, pv=NEVER_SKIP), density=density)


ALL_TILES = share(1.0)
ONE_TILE = Choice("1 tile a row", Thresholds(topk=1e-6, cdf=1.0, similarity=-1.0, pv=NEVER_SKIP))
"""A topk so small that every row of tiles keeps one, and under causal its diagonal tiles."""


def of_policy(
    name: str, policy: Policy, is_causal: bool, max_error: float | None, min_row_cosine: float | None = None
) -> Choice:
    """What a compiled call would do under this policy."""
    chosen = from_policy(policy, is_causal)
    bounds = {"max_error": max_error, "min_row_cosine": min_row_cosine}
    return Choice(name, chosen.thresholds[0], chosen.predictor, **bounds)


@dataclass(frozen=True)
class Problem:
    """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] of one dtype; Hq is a multiple of Hkv.

    precision: "int8" or "none", the sparse kernel's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool
    precision: str
    choice: Choice = ALL_TILES

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def facts(self) -> dict[str, Any]:
        """What the call is, for JSON."""
        shapes: dict[str, Any] = {name: list(x.shape) for name, x in zip("qkv", self.inputs, strict=True)}
        dtype = str(self.dtype).removeprefix("torch.")
        return {**shapes, "dtype": dtype, "is_causal": self.is_causal, "precision": self.precision}

    @property
    def dense_flops(self) -> float:
        """Operations of the two products if nothing is skipped but, under causal, the future."""
        batch, heads, q_len, head_dim = self.q.shape
        k_len, value_dim = self.v.shape[2:]
        square = min(q_len, k_len)
        pairs = square * square / 2 + (q_len - square) * k_len if self.is_causal else q_len * k_len
        return 2 * batch * heads * pairs * (head_dim + value_dim)

    def visible_tiles(self) -> int:
        """Tiles of 128 queries x 64 keys that hold a visible pair, over all heads."""
        batch, heads, q_len, _ = self.q.shape
        hidden = causal_tiles(q_len, self.k.shape[2], self.is_causal, torch.float32, self.q.device).hidden
        return batch * heads * int((~hidden).sum())

    def part(self, tokens: int, heads: int) -> Problem:
        """The first queries and keys of the first heads, contiguous; at least one key head."""
        kv_heads = min(max(heads // self.group, 1), self.k.shape[1])
        q = self.q[:1, : kv_heads * self.group, :tokens].contiguous()
        k, v = (x[:1, :kv_heads, :tokens].contiguous() for x in (self.k, self.v))
        return Problem(q, k, v, self.is_causal, self.precision, self.choice)


def outline(
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    is_causal: bool,
    precision: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    kv_heads: int | None = None,
    batch: int = 1,
) -> Problem:
    """A `smooth_problem` of zeros, which are there at once."""
    q, k, v = (
        torch.zeros(batch, of or heads, tokens, head_dim, dtype=dtype, device=device)
        for of in (heads, kv_heads, kv_heads)
    )
    return Problem(q, k, v, is_causal, precision)


def dense_flops(tokens: int, heads: int, head_dim: int, is_causal: bool) -> float:
    """Operations of the two products of self-attention of one batch entry."""
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
    kv_heads: int | None = None,
    batch: int = 1,
) -> Problem:
    """A smooth field, made on `device`; the query heads of a key head look at it from different places."""
    kv_heads = heads if kv_heads is None else kv_heads
    rows = -(-tokens // ROW)
    height = next(h for h in (8, 4, 2, 1) if rows % h == 0)
    grid = (rows // height, height, ROW)
    field = smooth_field(grid, heads=batch * kv_heads, head_dim=head_dim, device=device)
    q, k, v = (x[:, :, :tokens].reshape(batch, kv_heads, tokens, head_dim) for x in field)
    if heads != kv_heads:
        generator = torch.Generator(device).manual_seed(1)
        places = torch.randn(1, heads, 1, head_dim, generator=generator, device=device)
        q = q.repeat_interleave(heads // kv_heads, dim=1) + q.std() * places / 2
    q, k, v = (x.contiguous().to(dtype) for x in (q, k, v))
    return Problem(q, k, v, is_causal, precision)
