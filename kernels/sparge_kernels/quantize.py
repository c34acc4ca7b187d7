"""INT8 Q and K (SageAttention, arXiv 2410.02367; here one scale per query row and per K tile).

Codes are round-half-even(x / scale) with scale = max|x| / 127. What INT8 cannot hold (inf, NaN, a scale
below the normal range, a tile with an outlier key) is flagged `exact`: its codes are zero and the scores come from the
plain product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparge_kernels.predict import finite_tiles, tile_means
from sparge_kernels.thresholds import K_TILE
from sparge_kernels.tiles import split_tiles, tile_lengths

LARGEST_CODE = 127
OUTLIER_RATIO = 5.0  # of a tile's largest magnitude to the mean over its rows; Gaussian rows give less than 2
OFFSET_RATIO = 4.0
"""Of a tile's largest distance from a shared centre to that from its own mean. Beyond it K has under 5 bits left and
the rounding of Q meets the whole offset. At 8, keys with a bias that turns with the position came out with a relative
L1 of .12 where a tile's own mean gives .02; at 3, half of the tiles of a causal smooth field would be exact.
"""


@dataclass(frozen=True)
class QuantizedRows:
    """q ~ codes * scale[..., None]: codes int8 [..., S, D], scale [..., S], exact bool [..., S]."""

    codes: Tensor
    scale: Tensor
    exact: Tensor


@dataclass(frozen=True)
class QuantizedTiles:
    """k ~ codes * scale + mean, per tile, the ragged tail padded with zero codes.

    codes int8 [..., n, tile, D], scale and (bool) exact [..., n], mean [..., n, D] is what was subtracted.
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


def shared_centre(k: Tensor, is_causal: bool) -> Tensor:
    """One vector c [..., D] near the keys of k [..., S, D] that looks at nothing a causal row must not know of.

    The mean of the keys of all tiles that are finite and not zero (the empty end of a cache is zero). Under causal the
    mean of tile 0: a row that does not see all of that tile meets it on the diagonal only, which is not quantized.
    Zero where there is no such tile.
    """
    means = tile_means(k, K_TILE)
    lengths = tile_lengths(k.shape[-2], K_TILE, k.device)[:, None]
    usable = means.isfinite().all(-1, keepdim=True) & finite_tiles(k, K_TILE)[..., None]
    usable = usable & (split_tiles(k, K_TILE) != 0).any(-1).any(-1)[..., None]
    if is_causal:
        usable = usable & (torch.arange(means.shape[-2], device=k.device) == 0)[:, None]
    sums = torch.where(usable, means * lengths, 0).sum(-2)
    return sums / (usable * lengths).sum(-2).clamp(min=1)


def quantize_tiles(k: Tensor, centre: Tensor | None = None) -> QuantizedTiles:
    """One INT8 scale per K tile of k [..., S, D], after `centre` [..., D] or else the tile's own mean is subtracted.

    A tile much farther from the shared centre than from its own mean is `exact`: one huge key elsewhere may have moved
    the centre, or a bias on some channels may turn with the position.
    """
    own_mean = tile_means(k, K_TILE)
    mean = own_mean if centre is None else centre[..., None, :].expand_as(own_mean)
    real = torch.arange(K_TILE, device=k.device) < tile_lengths(k.shape[-2], K_TILE, k.device)[:, None]
    centred = torch.where(real[..., None], split_tiles(k, K_TILE) - mean[..., None, :], 0)
    row_largest = centred.abs().amax(-1)  # [..., n, tile]
    largest = row_largest.amax(-1)
    scale, exact = _scale(largest)
    # One key far beyond the rest of its tile would leave them a few codes each (measured: relative L1 .2 to 1.3).
    typical = row_largest.sum(-1) / tile_lengths(k.shape[-2], K_TILE, k.device)
    exact = exact | (largest > OUTLIER_RATIO * typical)
    if centre is not None:
        own = torch.where(real[..., None], split_tiles(k, K_TILE) - own_mean[..., None, :], 0).abs().amax((-2, -1))
        exact = exact | (largest > OFFSET_RATIO * own)
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
