"""Stage 1: which tiles of the score matrix are worth computing (arXiv 2502.18137, section 3.2).

`select_tiles` is the only entry a kernel needs; its steps are public because kernels are tested step by step.
There are two predictors: "clusters" (clusters.py) and the paper's, "sparge". The departures from the paper are listed
and reasoned in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_kernels.clusters import KeyClusters, cluster_keys, tile_weights
from sparge_kernels.masks import MaskTiles, causal_tiles, mask_tiles
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import split_tiles, tile_lengths, tile_rows

# ceil(0.07 * 100) is 8 in floating point: a product this little above a whole number is that number.
_CEIL_SLACK = 1e-6
_SCORES_AT_A_TIME = 2**24


def tile_means(x: Tensor, tile: int) -> Tensor:
    """Mean vector of each tile, padding excluded: [..., S, D] -> [..., n, D]."""
    lengths = tile_lengths(x.shape[-2], tile, x.device)
    return split_tiles(x, tile).sum(-2) / lengths[:, None]


def key_centres(k_means: Tensor, k_len: int, is_causal: bool) -> Tensor:
    """What each K tile is centred by before its self-similarity: [..., nK, D] -> [..., nK, D].

    The mean of all keys; under causal the mean of the keys of tiles 0..j, so that no later key is looked at.
    """
    lengths = tile_lengths(k_len, K_TILE, k_means.device)[:, None]
    sums = k_means * lengths
    if is_causal:
        return sums.cumsum(-2) / lengths.cumsum(0)
    return (sums.sum(-2, keepdim=True) / max(k_len, 1)).expand_as(k_means)


def self_similarity(x: Tensor, tile: int, centres: Tensor | None = None) -> Tensor:
    """Mean of the Gram matrix of each tile's L2-normalised rows: [..., S, D] -> [..., n], in [0, 1].

    Computed as ||sum of the normalised rows||^2 / n^2. Zero rows count as rows and contribute zeros; padding
    is no row. `centres` [..., n, D] is subtracted from the rows of each tile first. Non-finite rows give NaN.
    """
    lengths = tile_lengths(x.shape[-2], tile, x.device)
    rows = split_tiles(x, tile)
    if centres is not None:
        real = torch.arange(tile, device=x.device) < lengths[:, None]  # [n, tile]
        rows = torch.where(real[..., None], rows - centres[..., None, :], 0)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = torch.where(norms == 0, 0, rows / norms)
    return unit.sum(-2).square().sum(-1) / lengths.square()


def proxy_scores(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """Scores of the tile means, [..., nQ, D] x [..., nK, D] -> [..., nQ, nK], in nats."""
    return q_means @ k_means.transpose(-1, -2) * scale


def keep_largest(proxy: Tensor, candidates: Tensor, threshold: Thresholds) -> Tensor:
    """The candidates one head keeps: proxy scores [..., nQ, nK] and a bool mask -> bool [..., nQ, nK].

    The largest scores until their softmax weights reach `cdf` (the tile that crosses it is kept), or the best
    ceil(topk * candidates) of the row. Equal scores: the lower tile index first. A row whose proxy softmax
    is not a number cannot be predicted: all its candidates are kept.
    """
    weights = torch.softmax(proxy.masked_fill(~candidates, -torch.inf), dim=-1)
    # By score, not weight: weights that underflow to 0 are all equal.
    order = proxy.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    if threshold.topk is not None:
        allowed = (candidates.sum(-1, keepdim=True).double() * threshold.topk - _CEIL_SLACK).ceil().clamp(min=1)
        ranked = torch.arange(proxy.shape[-1], device=proxy.device) < allowed
    elif threshold.cdf >= 1:
        return candidates
    else:
        reached = weights.gather(-1, order).cumsum(-1)
        ranked = F.pad(reached[..., :-1], (1, 0)) < threshold.cdf
    kept = torch.zeros_like(candidates).scatter(-1, order, ranked.expand_as(order))
    unpredictable = weights.isnan().any(-1, keepdim=True)
    return candidates & (kept | unpredictable)


def finite_tiles(x: Tensor, tile: int) -> Tensor:
    """Bool [..., n]: every number of the tile is finite. [..., S, D] -> [..., n]."""
    return split_tiles(x.isfinite(), tile, fill=True).all(-1).all(-1)


def drop_smallest(weights: Tensor, candidates: Tensor, threshold: Thresholds) -> Tensor:
    """The candidates one head keeps by their weights (clusters.tile_weights): [..., nQ, nK] -> bool [..., nQ, nK].

    The smallest are dropped while their exponentials sum up to at most 1 - `cdf`: that is all that any row is
    predicted to lose. Or the best ceil(topk * candidates) of the row are kept. Of equal weights the lower tile index
    is kept first. `cdf` 1 keeps all candidates, and so does a row with a weight that is not a number.
    """
    ranks = weights.masked_fill(~candidates, -torch.inf)
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    if threshold.topk is not None:
        allowed = (candidates.sum(-1, keepdim=True).double() * threshold.topk - _CEIL_SLACK).ceil().clamp(min=1)
        ranked = torch.arange(weights.shape[-1], device=weights.device) < allowed
    elif threshold.cdf >= 1:
        return candidates
    else:
        rest = ranks.gather(-1, order).exp().flip(-1).cumsum(-1).flip(-1)  # of the tile and all after it
        ranked = rest > 1 - threshold.cdf
    kept = torch.zeros_like(candidates).scatter(-1, order, ranked.expand_as(order))
    unpredictable = (weights.isnan() & candidates).any(-1, keepdim=True)
    return candidates & (kept | unpredictable)


@dataclass(frozen=True)
class Prediction:
    """What stage 1 knows of a call before thresholds: [B, Hq, nQ, nK] unless said otherwise.

    scores: of the tile means, or ln of the weights, by `predictor`. whole: seen by every row; partial: seen in part,
    always kept. q_similarity [B, Hq, nQ], k_similarity [B, Hq, nK]: a tile below theta is not predictable, NaN never.
    """

    predictor: str
    scores: Tensor
    whole: Tensor
    partial: Tensor
    q_similarity: Tensor
    k_similarity: Tensor

    def keep(self, head: int, threshold: Thresholds) -> Tensor:
        """The tiles head `head` computes under `threshold`, bool [B, nQ, nK]."""
        predictable_k = (self.k_similarity[:, head] >= threshold.similarity)[:, None, :]
        whole = self.whole[:, head]
        if self.predictor == "sparge":
            predictable_q = (self.q_similarity[:, head] >= threshold.similarity)[:, :, None]
            largest = keep_largest(self.scores[:, head], predictable_k & whole, threshold)
        else:
            predictable_q = ~self.q_similarity[:, head].isnan()[:, :, None]
            largest = drop_smallest(self.scores[:, head], predictable_k & whole, threshold)
        return self.partial[:, head] | whole & (largest | ~predictable_q | ~predictable_k)


def predict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    predictor: str = DEFAULT_PREDICTOR,
    q_tiles: Tensor | None = None,
) -> Prediction:
    """Stage 1 up to the choice: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], fp32 or fp64.

    Query head h reads kv head h // (Hq // Hkv). mask: additive, broadcast to [B, Hq, Sq, Sk], not with is_causal.
    q_tiles: ascending int64 [n], the query tiles to predict for, n of them instead of nQ in all that is returned.
    """
    group = q.shape[1] // k.shape[1]
    k_means = tile_means(k, K_TILE)
    k_similarity = self_similarity(k, K_TILE, key_centres(k_means, k.shape[-2], is_causal))
    k_finite = finite_tiles(k, K_TILE) & finite_tiles(v, K_TILE) & k_means.isfinite().all(-1)
    k_similarity = k_similarity.masked_fill(~k_finite, torch.nan)  # NaN is below every theta
    q_means = tile_means(q, Q_TILE)
    q_similarity = self_similarity(q, Q_TILE).masked_fill(~q_means.isfinite().all(-1), torch.nan)

    shape = (q.shape[0], q.shape[1], q.shape[-2], k.shape[-2])
    if mask is not None:
        rows = mask.expand(shape)
        tiles = mask_tiles(rows if q_tiles is None else rows[..., tile_rows(q_tiles, Q_TILE, shape[2]), :])
    else:
        tiles = causal_tiles(*shape[2:], is_causal, q.dtype, q.device)
        if q_tiles is not None:
            tiles = MaskTiles(*(x[q_tiles] for x in (tiles.hidden, tiles.partial, tiles.bias, tiles.biased)))
    hidden, partial, bias = (x.expand(*shape[:2], *x.shape[-2:]) for x in (tiles.hidden, tiles.partial, tiles.bias))
    if q_tiles is not None:
        q_means, q_similarity = q_means[..., q_tiles, :], q_similarity[..., q_tiles]
    whole = ~hidden & ~partial
    k_similarity, k_finite = (x.repeat_interleave(group, dim=1) for x in (k_similarity, k_finite))
    if predictor == "sparge":
        scores = proxy_scores(q_means, k_means.repeat_interleave(group, dim=1), scale) + bias
    else:
        scores = _weights(q, k, scale, whole & k_finite[..., None, :], bias, q_tiles)
    return Prediction(predictor, scores, whole, partial, q_similarity, k_similarity)


def _weights(q: Tensor, k: Tensor, scale: float, seen: Tensor, bias: Tensor, q_tiles: Tensor | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    chosen = slice(None) if q_tiles is None else tile_rows(q_tiles, Q_TILE, q.shape[2])
    clusters = cluster_keys(torch.where(k.isfinite(), k, 0))
    weights = torch.empty(seen.shape, dtype=q.dtype, device=q.device)
    step = max(1, _SCORES_AT_A_TIME // max(clusters.log_sizes[:, 0].numel() * Q_TILE, 1))  # query tiles
    for head in range(q.shape[1]):
        of_head = KeyClusters(*(x[:, head // group] for x in (clusters.means, clusters.log_sizes, clusters.spreads)))
        of_rows = q[:, head, chosen]
        for first in range(0, seen.shape[2], step):
            tiles, rows = slice(first, first + step), slice(first * Q_TILE, (first + step) * Q_TILE)
            own = (seen[:, head, tiles], bias[:, head, tiles])
            weights[:, head, tiles] = tile_weights(of_rows[:, rows], of_head, scale, *own)
    return weights


def select_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Sequence[Thresholds],
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    predictor: str = DEFAULT_PREDICTOR,
) -> Tensor:
    """Stage 1: the tiles whose Q K^T is computed, bool [B, Hq, nQ, nK]; one threshold entry per query head.

    The other arguments are `predict`'s. Tiles in the causal future, or that the mask hides, are never selected; partial
    ones always.
    """
    prediction = predict(q, k, v, is_causal=is_causal, scale=scale, mask=mask, predictor=predictor)
    return torch.stack([prediction.keep(head, entry) for head, entry in enumerate(thresholds)], dim=1)
