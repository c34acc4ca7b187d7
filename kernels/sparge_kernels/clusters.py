"""The predictor "clusters": each query row scores a few clusters of keys per tile.

The paper's predictor ("sparge") compares the mean query of a tile with the mean key of a tile. What one query of 128
wants, or what one key of 64 offers, is lost in such means. Here

- queries are not pooled: a tile matters if it matters to any of its rows;
- the 64 keys of a tile are `CLUSTERS` groups, split off one by one around the key that its group's mean represents
  worst, so a lone key far from the others is a group of its own and its score is exact;
- a group of n keys with mean m holds at least n exp(scale q.m) of the row's softmax mass (Jensen), and about
  n exp(scale q.m + scale^2 |q|^2 v / 2) if its keys spread by v per channel.

The first, never too large, makes each row's denominator; the second makes the numerators. A tile's weight is the
largest share that any row of the query tile gives it: the sum of the weights of dropped tiles bounds what any row is
predicted to lose. Costs 2 * CLUSTERS / 64 of Q K^T.

Keys that a mask or the causal diagonal hides from some row of the query tile have no part in the denominators. The rows
share one choice, so a later row's own keys would change what an earlier row computes. Causal rows thus keep more than
they would if they knew the mass on their diagonal (seen on a field with a local band, 4096 tokens: .66 of the tiles at
tau = .95 instead of .42).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import split_tiles, tile_lengths

CLUSTERS = 4
LOUDEST = 1.5
"""A channel whose variance is this many times the mean decides the spread alone: queries may look along it.

A dozen keys of equal channels have a loudest one at about twice the mean. With the mean alone, keys that vary in a few
loud channels came out with a relative L1 of .2 (.1 and rows of no resemblance at 3); at 2 single rows of a cosine of .3
were left; at 1.5 none (tests/workloads, "loud channels"). A tenth more tiles is what it costs elsewhere.
"""


@dataclass(frozen=True)
class KeyClusters:
    """means [..., nK, CLUSTERS, D]; log_sizes (-inf: no such cluster) and spreads [..., nK, CLUSTERS].

    spread: variance per channel of the cluster's keys: the mean over the channels, at least the largest / LOUDEST.
    """

    means: Tensor
    log_sizes: Tensor
    spreads: Tensor


def cluster_keys(k: Tensor) -> KeyClusters:
    """Clusters of each K tile of k [..., Sk, D]; padding is no key. Tiles with a non-finite number give anything.

    All keys start in cluster 0. Cluster c takes the key farthest from its cluster's mean (the first of equals), and of
    the keys that share that cluster those closer to it than to their mean; nothing if every key is at its mean.
    """
    tiles = split_tiles(k, K_TILE)  # [..., nK, 64, D]
    real = torch.arange(K_TILE, device=k.device) < tile_lengths(k.shape[-2], K_TILE, k.device)[:, None]  # [nK, 64]
    labels = torch.zeros(tiles.shape[:-1], dtype=torch.long, device=k.device)
    labels = torch.where(real, labels, CLUSTERS)  # of padding: none
    for new in range(1, CLUSTERS):
        means = torch.stack([_mean(tiles, labels == c) for c in range(new)], dim=-2)  # [..., nK, new, D]
        own = _take(means, labels.clamp(max=new - 1))
        distances = (tiles - own).square().sum(-1).masked_fill(~real, -1)  # [..., nK, 64]
        farthest = distances.argmax(-1, keepdim=True)  # [..., nK, 1]
        closer = (tiles - _take(tiles, farthest)).square().sum(-1) < distances
        taken = closer & (labels == labels.gather(-1, farthest))
        labels = torch.where(taken, new, labels)
    members = [labels == c for c in range(CLUSTERS)]
    means = torch.stack([_mean(tiles, one) for one in members], dim=-2)
    sizes = torch.stack([one.sum(-1) for one in members], dim=-1).to(k.dtype)
    deviations = (tiles - _take(means, labels.clamp(max=CLUSTERS - 1))).square()
    spreads = torch.stack([_spread(_mean(deviations, one)) for one in members], dim=-1)
    return KeyClusters(means, sizes.log(), spreads)


def _spread(variances: Tensor) -> Tensor:
    """One number for the variances of all channels [..., D]: their mean, or what the loudest makes likely."""
    return torch.maximum(variances.mean(-1), variances.amax(-1) / LOUDEST)


def tile_weights(q: Tensor, clusters: KeyClusters, scale: float, seen: Tensor, bias: Tensor) -> Tensor:
    """ln of the largest share of its softmax mass that any row of a query tile gives a K tile: [..., nQ, nK].

    q [..., Sq, D]; clusters of the head's keys; scale: the caller's. seen, bool [..., nQ, nK]: tiles every row of the
    query tile sees, and whose numbers are finite; others have no part in anything and get -inf. bias [..., nQ, nK] is
    added to their scores.
    A query tile with a row that is not a number, or whose scores overflow, gets NaN.
    """
    sizes, spreads = clusters.log_sizes, clusters.spreads
    scores = torch.einsum("...qd,...ncd->...qnc", q, clusters.means) * scale + sizes[..., None, :, :]
    rise = 0.5 * scale * scale * q.square().sum(-1)  # [..., Sq]
    likely = (scores + rise[..., None, None] * spreads[..., None, :, :]).logsumexp(-1)  # [..., Sq, nK]
    least = scores.logsumexp(-1)
    hidden = ~_rows(seen, q.shape[-2])
    likely, least = ((x + _rows(bias, q.shape[-2])).masked_fill(hidden, -torch.inf) for x in (likely, least))
    total = least.logsumexp(-1)
    shares = likely - total[..., None]
    shares = shares.masked_fill(hidden & ~total.isnan()[..., None], -torch.inf)
    return split_tiles(shares, Q_TILE, fill=-torch.inf).amax(-2)  # NaN wins


def _rows(tiles: Tensor, q_len: int) -> Tensor:
    """[..., nQ, nK] -> [..., Sq, nK]."""
    return tiles.repeat_interleave(Q_TILE, dim=-2)[..., :q_len, :]


def _mean(tiles: Tensor, members: Tensor) -> Tensor:
    """Mean over the members of each tile: [..., n, 64, D] and bool [..., n, 64] -> [..., n, D]; of none: 0."""
    return (tiles * members[..., None]).sum(-2) / members.sum(-1, keepdim=True).clamp(min=1)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [..., r, D] at index [..., i]: [..., i, D]."""
    return rows.gather(-2, index[..., None].expand(*index.shape, rows.shape[-1]))
