"""INT8 Q and K (SageAttention, arXiv 2410.02367; here one scale per query row and per K tile).

Codes are round-half-even(x / scale) with scale = max|x| / 127. What INT8 cannot hold (inf, NaN, a scale
below the normal range, a tile with an outlier key) is flagged `exact`: its codes are zero and the scores come from the
plain product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparge_kernels.predict import tile_means
from sparge_kernels.thresholds import K_TILE
from sparge_kernels.tiles import split_tiles, tile_lengths

LARGEST_CODE = 127
OUTLIER_RATIO = 5.0  # of a tile's largest magnitude to the mean over its rows; Gaussian rows give less than 2


@dataclass(frozen=True)
class QuantizedRows:
    """q ~ codes * scale[..., None]: codes int8 [..., S, D], scale [..., S], exact bool [..., S]."""

    codes: Tensor
    scale: Tensor
    exact: Tensor


@dataclass(frozen=True)
class QuantizedTiles:
    """k ~ codes * scale + mean, per tile, the ragged tail padded with zero codes.

    codes int8 [..., n, tile, D], scale and (bool) exact [..., n], mean [..., n, D].
    """

    codes: Tensor
    scale: Tensor
    mean: Tensor
    exact: Tensor


def quantize_rows(q: Tensor) -> QuantizedRows:
    """One INT8 scale per row of q [..., S, D]: a row never depends on another token."""
    largest = q.abs().amax(-1)
    scale, exact = _scale(largest)
    codes = _codes(q, scale[..., None], exact[..., None])
    return QuantizedRows(codes, scale, exact)


def quantize_tiles(k: Tensor) -> QuantizedTiles:
    """One INT8 scale per K tile of k [..., S, D], after the tile's own mean m_j is subtracted."""
    mean = tile_means(k, K_TILE)
    real = torch.arange(K_TILE, device=k.device) < tile_lengths(k.shape[-2], K_TILE, k.device)[:, None]
    centred = torch.where(real[..., None], split_tiles(k, K_TILE) - mean[..., None, :], 0)
    row_largest = centred.abs().amax(-1)  # [..., n, tile]
    largest = row_largest.amax(-1)
    scale, exact = _scale(largest)
    # One key far beyond the rest of its tile would leave them a few codes each (measured: relative L1 .2 to 1.3).
    typical = row_largest.sum(-1) / tile_lengths(k.shape[-2], K_TILE, k.device)
    exact = exact | (largest > OUTLIER_RATIO * typical)
    scale = scale.masked_fill(exact, 0)
    codes = _codes(centred, scale[..., None, None], exact[..., None, None])
    return QuantizedTiles(codes, scale, mean, exact)


def _scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest / LARGEST_CODE
    # An all-zero row is exact in INT8 (scale 0); a subnormal scale would lose digits of x / scale.
    subnormal = (largest > 0) & (scale < torch.finfo(scale.dtype).tiny)
    exact = ~scale.isfinite() | subnormal
    return scale.masked_fill(exact, 0), exact


def _codes(x: Tensor, scale: Tensor, exact: Tensor) -> Tensor:
    codes = (x / torch.where(scale == 0, 1, scale)).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return torch.where(exact | (scale == 0), 0, codes).to(torch.int8)
