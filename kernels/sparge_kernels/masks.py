"""What attn_mask means for each pair of tiles: nothing to compute, nothing to look at, or look and compute exactly.

Bool True is "attend"; floats are added to the scores, in nats. A tile is

- hidden: -inf everywhere. It is never visited, and does not count as visible.
- plain: finite numbers that differ by at most `MASK_SPREAD`. Rows want nearly the same of it, so its mean score
  may speak for it: mean(q) . mean(k) * scale plus the mean of the mask. It is quantized as any other.
- partial: all others. Which rows need it is no matter of means: it is kept, unquantized, and its P V is not skipped.
  So every row keeps the edge of what it may see, and what a mask hides inside a tile touches no visible number.

The guarantee of causal calls, that no later key changes an earlier output by a bit, is `is_causal`'s alone: under a
mask, hidden keys still have a part in the mean that K tiles are centred by before their self-similarity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import diagonal_tiles, past_tiles, split_tiles

MASK_SPREAD = 1.0
"""Largest difference in nats inside a tile whose mask is represented by its mean."""


@dataclass(frozen=True)
class MaskTiles:
    """Per pair of tiles, [..., nQ, nK]: bool `hidden` and `partial`, float `bias` (0 where not plain).

    `biased`: plain, but not 0 everywhere.
    """

    hidden: Tensor
    partial: Tensor
    bias: Tensor
    biased: Tensor


def additive_mask(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores, in nats."""
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(dtype)
    return torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill(~attn_mask, -torch.inf)


def mask_tiles(mask: Tensor) -> MaskTiles:
    """Sorts the tiles of an additive mask [..., Sq, Sk]."""
    largest = _split(mask, -torch.inf).amax((-2, -1))
    smallest = _split(mask, torch.inf).amin((-2, -1))
    # fp64: the sum of a tile of the largest numbers is a number too.
    means = _split(mask.double(), 0).sum((-2, -1)) / _split(torch.ones_like(mask), 0).sum((-2, -1))
    hidden = largest == -torch.inf
    plain = (largest < torch.inf) & (largest - smallest <= MASK_SPREAD)  # NaN is not
    biased = plain & ((largest != 0) | (smallest != 0))
    return MaskTiles(hidden, ~hidden & ~plain, torch.where(plain, means, 0).to(mask.dtype), biased)


def causal_tiles(q_len: int, k_len: int, is_causal: bool, dtype: torch.dtype, device: torch.device) -> MaskTiles:
    """The tiles of a call without a mask [nQ, nK]; under causal the diagonal is partial, the future hidden."""
    past = past_tiles(q_len, k_len, is_causal, device)
    diagonal = diagonal_tiles(q_len, k_len, is_causal, device)
    bias = torch.zeros(past.shape, dtype=dtype, device=device)
    return MaskTiles(~past & ~diagonal, diagonal, bias, torch.zeros_like(past))


def _split(mask: Tensor, fill: float) -> Tensor:
    """[..., Sq, Sk] -> [..., nQ, nK, 64, 128]; what lies beyond the ends is `fill`."""
    return split_tiles(split_tiles(mask, Q_TILE, fill).transpose(-1, -2), K_TILE, fill)
