"""The clusters of each K tile (sparge_kernels/clusters.py), as fp16 codes the matrix units take.

A kernel of its own: it reads K once more (from L2 where K fits), but in the pass that makes the means it would hold V
in registers as well, and the centre would not be there yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.clusters import CLUSTERS, LOUDEST
from sparge_kernels.thresholds import K_TILE
from sparge_kernels.triton import launch
from sparge_kernels.triton.rows import all_finite, load_tile, power_of_two, strides_in_units

# KeyClusters.numbers
SCALE: tl.constexpr = tl.constexpr(0)
LOG_SIZE: tl.constexpr = tl.constexpr(1)
SPREAD: tl.constexpr = tl.constexpr(2)
NUMBERS: tl.constexpr = tl.constexpr(3)

_NUMBERS_A_WARP = 1024  # of a tile: 32 in each thread, beside their distances


@dataclass(frozen=True)
class KeyClusters:
    """Contiguous, cluster by cluster, so that a block of tiles is a block of memory; D' = launch.padded(D).

    codes: fp16 [B, Hkv, CLUSTERS, nK, D'], (mean - centre of the head) / scale.
    numbers: fp32 [B, Hkv, NUMBERS, CLUSTERS, nK]: scale (a power of two), ln of the number of keys, spread.

    fp16 under a scale of its own keeps 11 bits of the largest channels, whatever the dtype of K: bf16 would err by .1
    nats in a score of 50. Where a tile cannot be predicted (non-finite K or V) all log sizes are -inf: it has no part.
    """

    codes: Tensor
    numbers: Tensor


def cluster_keys(k: Tensor, means: Tensor, flags: Tensor, unusable: int) -> KeyClusters:
    """K [B, Hkv, Sk, D]; means and flags of KeyTiles. Tiles with a bit of `unusable` in their flags have no part.

    No number of a tile depends on a later one.
    """
    batch, heads, k_len, dim = k.shape
    n_k, padded = means.shape[2:]
    codes = torch.empty(batch, heads, CLUSTERS, n_k, padded, dtype=torch.float16, device=k.device)
    numbers = torch.empty(batch, heads, NUMBERS.value, CLUSTERS, n_k, dtype=torch.float32, device=k.device)
    strides, unit = strides_in_units(k)
    launch.run(
        cluster_keys_kernel, (batch * heads * n_k,), k, means, flags, codes, numbers, *strides, heads, k_len, n_k,
        UNUSABLE=unusable, UNIT=unit, DIM=dim, PADDED=padded, K_TILE=K_TILE, CLUSTERS=CLUSTERS,
        LOUDEST=LOUDEST,
        num_warps=K_TILE * padded // _NUMBERS_A_WARP,
    )  # fmt: skip
    return KeyClusters(codes, numbers)


@triton.jit
def head_centre(means_ptr, kv_head, n_k, dims, PADDED: tl.constexpr):
    """What all means and keys of a head are centred by [D']: the mean of its first tile, 0 if that is not finite.

    It moves all scores of a row alike, so no share of the row's mass; it takes from the codes' rounding what all keys
    have in common; and of a causal call no key before it is in any choice.
    """
    first = tl.load(means_ptr + kv_head.to(tl.int64) * n_k * PADDED + dims)
    return tl.where(all_finite(first), first, 0.0)


@triton.jit
def _mean(k, members):
    """Mean of the members [64] of k [64, D']; of none: 0."""
    size = tl.sum(members.to(tl.float32), 0)
    return tl.sum(tl.where(members[:, None], k, 0.0), 0) / tl.maximum(size, 1.0)


@triton.jit
def _distances(k, labels, mean_0, mean_1, mean_2, mean_3):
    """Squared distance of each key to the mean of its cluster [64]."""
    labels = labels[:, None]
    own = tl.where(labels == 2, mean_2[None, :], mean_3[None, :])
    own = tl.where(labels == 0, mean_0[None, :], tl.where(labels == 1, mean_1[None, :], own))
    return tl.sum((k - own) * (k - own), 1)


@triton.jit(do_not_specialize=["heads", "k_len", "n_k"])
def cluster_keys_kernel(
    k_ptr, means_ptr, flags_ptr, codes_ptr, numbers_ptr,
    k_batch, k_head, k_token, k_dim, heads, k_len, n_k,
    UNUSABLE: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, K_TILE: tl.constexpr,
    CLUSTERS: tl.constexpr, LOUDEST: tl.constexpr,
) -> None:  # fmt: skip
    """The clusters of one K tile; grid (B * Hkv * nK,)."""
    program = tl.program_id(0)
    j, kv_head = program % n_k, program // n_k
    batch, head = kv_head // heads, kv_head % heads
    in_tile, dims = tl.arange(0, K_TILE), tl.arange(0, PADDED)
    rows = j * K_TILE + in_tile
    real = rows < k_len
    k = load_tile(
        k_ptr, batch, head, k_batch, k_head, k_token, k_dim, rows, dims, k_len, UNIT, DIM, PADDED, ""
    )  # [64, D']
    k_at = k_ptr + (batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head) * UNIT + dims.to(tl.int64) * k_dim

    labels = tl.where(real, 0, CLUSTERS)
    mean_0 = _mean(k, real)
    mean_1, mean_2, mean_3 = mean_0, mean_0, mean_0
    for new in tl.range(1, CLUSTERS):  # at run time: unrolled, it takes registers for all rounds
        distances = _distances(k, labels, mean_0, mean_1, mean_2, mean_3)
        distances = tl.where(real, distances, -1.0)
        farthest = tl.min(tl.where(distances == tl.max(distances, 0), in_tile, K_TILE - 1), 0)
        split = tl.sum(tl.where(in_tile == farthest, labels, 0), 0)
        key_at = k_at + (j * K_TILE + farthest).to(tl.int64) * k_token * UNIT
        key = tl.load(key_at, mask=dims < DIM, other=0.0).to(tl.float32)  # [D'], from L1
        closer = tl.sum((k - key[None, :]) * (k - key[None, :]), 1) < distances
        labels = tl.where(closer & (labels == split), new, labels)
        left, taken = _mean(k, labels == split), _mean(k, labels == new)
        mean_0 = tl.where(split == 0, left, mean_0)
        mean_1 = tl.where(new == 1, taken, tl.where(split == 1, left, mean_1))
        mean_2 = tl.where(new == 2, taken, tl.where(split == 2, left, mean_2))
        mean_3 = tl.where(new == 3, taken, mean_3)

    usable = (tl.load(flags_ptr + program) & UNUSABLE) == 0
    centre = head_centre(means_ptr, kv_head, n_k, dims, PADDED)
    for c in tl.static_range(0, CLUSTERS):
        mean = mean_0 if c == 0 else mean_1 if c == 1 else mean_2 if c == 2 else mean_3
        deviations = tl.where((labels == c)[:, None], k - mean[None, :], 0.0)
        variances = tl.sum(deviations * deviations, 0)  # [D'], times the number of keys
        mean = tl.where(usable, mean - centre, 0.0)
        size = tl.sum((labels == c).to(tl.float32), 0)
        spread = tl.maximum(tl.sum(variances, 0) / DIM, tl.max(variances, 0) / LOUDEST) / tl.maximum(size, 1.0)
        scale, inverse = power_of_two(tl.max(tl.abs(mean), 0))
        at = (kv_head.to(tl.int64) * CLUSTERS + c) * n_k + j
        tl.store(codes_ptr + at * PADDED + dims, (mean * inverse).to(tl.float16))
        at = (kv_head.to(tl.int64) * NUMBERS * CLUSTERS + c) * n_k + j
        tl.store(numbers_ptr + at + SCALE * CLUSTERS * n_k, scale)
        log_size = tl.where(tl.where(usable, size, 0.0) > 0.0, tl.log(tl.maximum(size, 1.0)), float("-inf"))
        tl.store(numbers_ptr + at + LOG_SIZE * CLUSTERS * n_k, log_size)
        tl.store(numbers_ptr + at + SPREAD * CLUSTERS * n_k, tl.where(usable, spread, 0.0))
