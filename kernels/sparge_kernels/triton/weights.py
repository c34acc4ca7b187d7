"""The weights of K tiles to query tiles, by rows and clusters (sparge_kernels/clusters.py, tile_weights).

One program per query tile goes over the clusters of all K tiles twice: for each row's total mass, then for each tile's
largest share of it. Scores are in log2 units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.clusters import CLUSTERS
from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import tile_count
from sparge_kernels.triton import launch
from sparge_kernels.triton.attend import LN_2, LOG2_E, multiply
from sparge_kernels.triton.clusters import LOG_SIZE, NUMBERS, SCALE, SPREAD, KeyClusters
from sparge_kernels.triton.mask import BIASED, HIDDEN, OPEN, MaskTiles
from sparge_kernels.triton.rows import broadcast_strides, load_tile, power_of_two, strides_in_units

# Stands for -inf, whose difference with itself is no number; what is below _HIDDEN is hidden.
_NOTHING: tl.constexpr = tl.constexpr(-1e30)
_HIDDEN: tl.constexpr = tl.constexpr(-1e29)


def weigh_tiles(
    q: Tensor, clusters: KeyClusters, mask_tiles: MaskTiles | None, *, is_causal: bool, scale: float, k_len: int
) -> Tensor:
    """clusters.tile_weights of q [B, Hq, Sq, D] and the clusters of `k_len` keys: fp32 [B, Hq, nQ, nK], in nats.

    Undefined for tiles that are not wholly in the causal past. NaN for a whole query tile where a row is not a number
    or its scores overflow; -inf for tiles that the mask hides or cuts, or that have no part (KeyClusters).
    """
    (batch, heads, q_len, dim), kv_heads = q.shape, clusters.codes.shape[1]
    n_q, n_k, padded = tile_count(q_len, Q_TILE), tile_count(k_len, K_TILE), launch.padded(dim)
    weights = torch.empty(batch, heads, n_q, n_k, dtype=torch.float32, device=q.device)
    kind, bias = (None, None) if mask_tiles is None else (mask_tiles.kind, mask_tiles.bias)
    q_strides, q_unit = strides_in_units(q)
    arch = launch.architecture(q.device)
    config = launch.weights_config(arch, dim)
    launch.run(
        tile_weights_kernel, (batch * heads * n_q,),
        q, clusters.codes, clusters.numbers, kind, bias, weights,
        *q_strides, *broadcast_strides(kind), heads, heads // kv_heads, q_len, n_q, n_k,
        float(scale), Q_UNIT=q_unit, DIM=dim, PADDED=padded, Q_TILE=Q_TILE, K_TILE=K_TILE,
        BLOCK=config.block, CLUSTERS=CLUSTERS, CAUSAL=is_causal, MASKED=kind is not None,
        PRODUCT=launch.product(arch), LOOP_STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return weights


@triton.jit
def _cluster_scores(
    q, factor, first, end, n_k, dims, codes_at, numbers_at, kind_at, bias_at, mask_key,
    BLOCK: tl.constexpr, CLUSTERS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Scores of the clusters of BLOCK tiles, with ln of their sizes, in log2 units, and their spreads; of what is not
    seen: `_NOTHING` and 0. [128, CLUSTERS * BLOCK] and [CLUSTERS * BLOCK], cluster by cluster.
    """
    columns = tl.arange(0, CLUSTERS * BLOCK)
    tiles = first + columns % BLOCK
    seen = tiles < end
    added = tl.zeros([CLUSTERS * BLOCK], tl.float32)
    if MASKED:
        kind = tl.load(kind_at + tiles.to(tl.int64) * mask_key, mask=seen, other=HIDDEN)
        seen = (kind == OPEN) | (kind == BIASED)
        added = tl.load(bias_at + tiles.to(tl.int64) * mask_key, mask=seen, other=0.0)
    at = columns // BLOCK * n_k + tiles
    codes = tl.load(codes_at + at.to(tl.int64)[None, :] * PADDED + dims[:, None], mask=seen[None, :], other=0.0)
    scale = tl.load(numbers_at + SCALE * CLUSTERS * n_k + at, mask=seen, other=0.0)
    log_size = tl.load(numbers_at + LOG_SIZE * CLUSTERS * n_k + at, mask=seen, other=float("-inf"))
    spread = tl.load(numbers_at + SPREAD * CLUSTERS * n_k + at, mask=seen, other=0.0)
    offset = tl.maximum((log_size + added) * LOG2_E, _NOTHING)
    products = multiply(q, codes, tl.zeros([q.shape[0], CLUSTERS * BLOCK], tl.float32), PRODUCT)
    return products * (factor[:, None] * scale[None, :]) + offset[None, :], spread


@triton.jit(do_not_specialize=["mask_batch", "mask_head", "mask_query", "heads", "group", "q_len", "n_q", "n_k"])
def tile_weights_kernel(
    q_ptr, codes_ptr, numbers_ptr, kind_ptr, bias_ptr, weights_ptr,
    q_batch, q_head, q_token, q_dim,
    mask_batch, mask_head, mask_query, mask_key, heads, group, q_len, n_q, n_k, scale,
    Q_UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr, BLOCK: tl.constexpr, CLUSTERS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRODUCT: tl.constexpr, LOOP_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """The weights of one query tile; grid (B * Hq * nQ,), the query tiles with the longest past first."""
    head, i = tl.program_id(0) // n_q, n_q - 1 - tl.program_id(0) % n_q
    batch, q_head_index = head // heads, head % heads
    kv_head_index = q_head_index // group
    kv_head = batch.to(tl.int64) * (heads // group) + kv_head_index
    rows, dims = i * Q_TILE + tl.arange(0, Q_TILE), tl.arange(0, PADDED)
    row = head.to(tl.int64) * n_q + i
    q = load_tile(
        q_ptr, batch, q_head_index, q_batch, q_head, q_token, q_dim, rows, dims, q_len, Q_UNIT, DIM, PADDED, ""
    )  # [128, D']
    # Infinite where q is no number, or squares of q overflow.
    rise = tl.sum(q * q, 1) * (0.5 * LOG2_E * scale * scale)
    q_scale, inverse = power_of_two(tl.max(tl.abs(q), 1))
    factor = q_scale * (scale * LOG2_E)
    q_codes = (q * inverse[:, None]).to(tl.float16)

    end = n_k  # of the tiles that may be seen
    maximum, mass = tl.full([Q_TILE], _NOTHING, tl.float32), tl.zeros([Q_TILE], tl.float32)
    if CAUSAL:
        end = tl.minimum(i * (Q_TILE // K_TILE), n_k)

    codes_at = codes_ptr + kv_head * CLUSTERS * n_k * PADDED
    numbers_at = numbers_ptr + kv_head * NUMBERS * CLUSTERS * n_k
    kind_at, bias_at = kind_ptr, bias_ptr
    if MASKED:
        mask_at = batch.to(tl.int64) * mask_batch + q_head_index.to(tl.int64) * mask_head + i.to(tl.int64) * mask_query
        kind_at, bias_at = kind_ptr + mask_at, bias_ptr + mask_at
    for first in tl.range(0, end, BLOCK, num_stages=LOOP_STAGES):
        s, _ = _cluster_scores(
            q_codes, factor, first, end, n_k, dims, codes_at, numbers_at, kind_at, bias_at, mask_key,
            BLOCK, CLUSTERS, PADDED, MASKED, PRODUCT,
        )  # fmt: skip
        larger = tl.maximum(maximum, tl.max(s, 1))
        mass = mass * tl.exp2(maximum - larger) + tl.sum(tl.exp2(s - larger[:, None]), 1)
        maximum = larger

    total = maximum + tl.log2(mass)
    # Of NaN no comparison holds. A row of nothing but hidden tiles has no candidate either.
    spoiled = tl.where((tl.abs(total) < -_HIDDEN) & (rise < float("inf")), 0, 1)
    spoiled = tl.max(tl.where(rows < q_len, spoiled, 0), 0)
    total = tl.where(rows < q_len, total, float("inf"))[:, None]  # no share is the largest there
    for first in tl.range(0, end, BLOCK, num_stages=LOOP_STAGES):
        s, spread = _cluster_scores(
            q_codes, factor, first, end, n_k, dims, codes_at, numbers_at, kind_at, bias_at, mask_key,
            BLOCK, CLUSTERS, PADDED, MASKED, PRODUCT,
        )  # fmt: skip
        s = tl.reshape(s + rise[:, None] * spread[None, :], [Q_TILE, CLUSTERS, BLOCK])
        largest = tl.max(s, 1)
        likely = largest + tl.log2(tl.sum(tl.exp2(s - largest[:, None, :]), 1))  # [128, BLOCK]
        share = tl.max(likely - total, 0) * LN_2  # [BLOCK]
        share = tl.where(share < _HIDDEN, float("-inf"), share)
        share = tl.where(spoiled != 0, float("nan"), share)
        tiles = first + tl.arange(0, BLOCK)
        tl.store(weights_ptr + row * n_k + tiles, share, mask=tiles < end)
