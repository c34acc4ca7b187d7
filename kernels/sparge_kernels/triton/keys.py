"""K and V before the sparse loop: tile means, centres, self-similarity and INT8 codes (predict.py, quantize.py).

Three kernels, because centring a tile takes the means of others. K is read twice, V once; a fourth is in
clusters.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.quantize import OFFSET_RATIO, OUTLIER_RATIO
from sparge_kernels.thresholds import K_TILE
from sparge_kernels.tiles import tile_count
from sparge_kernels.triton import launch
from sparge_kernels.triton.clusters import KeyClusters, cluster_keys
from sparge_kernels.triton.rows import all_finite, int8_scale, inverse_or_zero, load_tile, round_codes, strides_in_units

# Bits of KeyTiles.flags.
NOT_INT8: tl.constexpr = tl.constexpr(1)
NON_FINITE_V: tl.constexpr = tl.constexpr(2)
NON_FINITE_K: tl.constexpr = tl.constexpr(4)
_ZERO_K: tl.constexpr = tl.constexpr(8)  # only between the kernels here

_NUMBERS_A_WARP = 2048  # of a tile: 64 in each thread
_CENTRE_TILES, _CENTRE_DIMS, _CENTRE_WARPS = 128, 32, 4


@dataclass(frozen=True)
class KeyTiles:
    """What stage 1 and the sparse loop need of K and V; contiguous; D' = launch.padded(D), padded with zeros."""

    codes: Tensor | None  # int8 [B, Hkv, nK, 64, D'], 0 where exact or padding; None if not quantized
    scale: Tensor | None  # fp32 [B, Hkv, nK], 0 where exact; None if not quantized
    centre: Tensor | None  # fp32 [B, Hkv, D'], what all keys of a head were centred by; None if not quantized
    means: Tensor  # fp32 [B, Hkv, nK, D'], not centred
    similarity: Tensor  # fp32 [B, Hkv, nK], NaN where K, V or the mean of K has a non-finite number
    flags: Tensor  # int8 [B, Hkv, nK]: NOT_INT8 (only if quantized), NON_FINITE_V, NON_FINITE_K (or its mean)
    clusters: KeyClusters | None = None  # None if not clustered


def prepare_keys(k: Tensor, v: Tensor, *, is_causal: bool, quantized: bool, clustered: bool = False) -> KeyTiles:
    """K [B, Hkv, Sk, D] and V [B, Hkv, Sk, Dv], fp32, bf16 or fp16 with any strides, on one device.

    clustered: for the predictor "clusters".

    Not one number of a tile depends on a later key under causal.
    """
    batch, heads, k_len, dim = k.shape
    padded, v_padded = launch.padded(dim), launch.padded(v.shape[3])
    n_k = tile_count(k_len, K_TILE)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=k.device)

    means, similarity, flags = new(n_k, padded), new(n_k), new(n_k, dtype=torch.int8)
    similarity_centres = new(n_k if is_causal else 1, padded)
    codes = new(n_k, K_TILE, padded, dtype=torch.int8) if quantized else None
    scale, centre = (new(n_k), new(padded)) if quantized else (None, None)
    (k_strides, k_unit), (v_strides, v_unit) = strides_in_units(k), strides_in_units(v)
    grid = (batch * heads * n_k,)
    launch.run(
        key_means_kernel, grid, k, v, means, flags, *k_strides, *v_strides, heads, k_len, n_k,
        K_UNIT=k_unit, V_UNIT=v_unit, DIM=dim, PADDED=padded, V_DIM=v.shape[3], V_PADDED=v_padded, K_TILE=K_TILE,
        QUANTIZED=quantized, num_warps=K_TILE * max(padded, v_padded) // _NUMBERS_A_WARP,
    )  # fmt: skip
    launch.run(
        key_centres_kernel, (batch * heads, padded // _CENTRE_DIMS),
        means, flags, similarity_centres, centre, k_len, n_k,
        PADDED=padded, DIMS=_CENTRE_DIMS, TILES=_CENTRE_TILES, K_TILE=K_TILE, CAUSAL=is_causal, QUANTIZED=quantized,
        num_warps=_CENTRE_WARPS,
    )  # fmt: skip
    launch.run(
        quantize_keys_kernel, grid, k, means, similarity_centres, centre, similarity, flags, codes, scale,
        *k_strides, heads, k_len, n_k,
        UNIT=k_unit, DIM=dim, PADDED=padded, K_TILE=K_TILE, CAUSAL=is_causal, QUANTIZED=quantized,
        OUTLIER_RATIO=OUTLIER_RATIO, OFFSET_RATIO=OFFSET_RATIO, num_warps=K_TILE * padded // _NUMBERS_A_WARP,
    )  # fmt: skip
    clusters = cluster_keys(k, means, flags, NON_FINITE_K.value | NON_FINITE_V.value) if clustered else None
    return KeyTiles(codes, scale, centre, means, similarity, flags, clusters)


@triton.jit(do_not_specialize=["heads", "k_len", "n_k"])
def key_means_kernel(
    k_ptr, v_ptr, means_ptr, flags_ptr,
    k_batch, k_head, k_token, k_dim,
    v_batch, v_head, v_token, v_dim,
    heads, k_len, n_k, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, V_DIM: tl.constexpr, V_PADDED: tl.constexpr, K_TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
) -> None:  # fmt: skip
    """Mean of one K tile, and whether it and the V tile are finite; grid (B * Hkv * nK,)."""
    program = tl.program_id(0)
    j = program % n_k
    batch, head = program // n_k // heads, program // n_k % heads
    rows = j * K_TILE + tl.arange(0, K_TILE)
    dims, v_dims = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    k = load_tile(
        k_ptr, batch, head, k_batch, k_head, k_token, k_dim, rows, dims, k_len, K_UNIT, DIM, PADDED, ""
    )  # [64, D']
    v = load_tile(
        v_ptr, batch, head, v_batch, v_head, v_token, v_dim, rows, v_dims, k_len, V_UNIT, V_DIM, V_PADDED, "evict_first"
    )  # [64, Dv']
    mean = tl.sum(k, 0) / tl.minimum(k_len - j * K_TILE, K_TILE).to(tl.float32)
    # A sum with inf or NaN in it is not finite, so the mean speaks for K too.
    flags = tl.where(all_finite(mean), 0, NON_FINITE_K) + tl.where(tl.sum(v * 0.0) == 0.0, 0, NON_FINITE_V)
    if QUANTIZED:
        flags += tl.where(tl.max(tl.abs(k)) == 0.0, _ZERO_K, 0)
    tl.store(means_ptr + program.to(tl.int64) * PADDED + dims, mean)
    tl.store(flags_ptr + program, flags.to(tl.int8))


@triton.jit(do_not_specialize=["k_len", "n_k"])
def key_centres_kernel(
    means_ptr, flags_ptr, similarity_centres_ptr, centre_ptr, k_len, n_k,
    PADDED: tl.constexpr, DIMS: tl.constexpr, TILES: tl.constexpr, K_TILE: tl.constexpr, CAUSAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
) -> None:  # fmt: skip
    """predict.key_centres and quantize.shared_centre of `DIMS` channels; grid (B * Hkv, D' / DIMS)."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    total, usable_total = tl.zeros([DIMS], tl.float32), tl.zeros([DIMS], tl.float32)
    usable_keys = 0.0
    for first in range(0, n_k, TILES):
        tiles = first + tl.arange(0, TILES)
        inside = tiles < n_k
        lengths = tl.where(inside, tl.minimum(k_len - tiles * K_TILE, K_TILE), 0).to(tl.float32)
        at = (head * n_k + tiles)[:, None] * PADDED + dims[None, :]
        means = tl.load(means_ptr + at, mask=inside[:, None], other=0.0)  # [tiles, dims]
        sums = means * lengths[:, None]
        if CAUSAL:
            keys_so_far = tl.minimum(tiles * K_TILE + K_TILE, k_len).to(tl.float32)
            prefix = (total[None, :] + tl.cumsum(sums, 0)) / keys_so_far[:, None]
            tl.store(similarity_centres_ptr + at, prefix, mask=inside[:, None])
        elif QUANTIZED:
            flags = tl.load(flags_ptr + head * n_k + tiles, mask=inside, other=0)
            usable = (flags & (NON_FINITE_K | _ZERO_K)) == 0
            usable_total += tl.sum(tl.where(usable[:, None], sums, 0.0), 0)
            usable_keys += tl.sum(tl.where(usable, lengths, 0.0), 0)
        total += tl.sum(sums, 0)
    if not CAUSAL:
        tl.store(similarity_centres_ptr + head * PADDED + dims, total / k_len.to(tl.float32))
    if QUANTIZED:
        if CAUSAL:
            usable_total = tl.load(means_ptr + head * n_k * PADDED + dims)
            usable_total = tl.where((tl.load(flags_ptr + head * n_k) & NON_FINITE_K) == 0, usable_total, 0.0)
        else:
            usable_total = usable_total / tl.maximum(usable_keys, 1.0)
        tl.store(centre_ptr + head * PADDED + dims, usable_total)


@triton.jit(do_not_specialize=["heads", "k_len", "n_k"])
def quantize_keys_kernel(
    k_ptr, means_ptr, similarity_centres_ptr, centre_ptr, similarity_ptr,
    flags_ptr, codes_ptr, scale_ptr, k_batch, k_head, k_token, k_dim,
    heads, k_len, n_k,
    UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, K_TILE: tl.constexpr, CAUSAL: tl.constexpr,
    QUANTIZED: tl.constexpr, OUTLIER_RATIO: tl.constexpr, OFFSET_RATIO: tl.constexpr,
) -> None:  # fmt: skip
    """Self-similarity and INT8 codes of one K tile; grid (B * Hkv * nK,).

    Rows beyond the end hold what is left of the centres there: they are taken out row by row, not number by number.
    """
    program = tl.program_id(0)
    j = program % n_k
    kv_head = program // n_k
    batch, head = kv_head // heads, kv_head % heads
    rows, dims = j * K_TILE + tl.arange(0, K_TILE), tl.arange(0, PADDED)
    real, length = rows < k_len, tl.minimum(k_len - j * K_TILE, K_TILE).to(tl.float32)
    k = load_tile(
        k_ptr, batch, head, k_batch, k_head, k_token, k_dim, rows, dims, k_len, UNIT, DIM, PADDED, ""
    )  # [64, D']
    flags = tl.load(flags_ptr + program) & ~_ZERO_K
    own_largest = 0.0
    if QUANTIZED:
        mean = tl.load(means_ptr + program.to(tl.int64) * PADDED + dims)
        own_largest = tl.max(tl.where(real[:, None], tl.abs(k - mean[None, :]), 0.0))

    centred_by = program if CAUSAL else kv_head
    centred = k - tl.load(similarity_centres_ptr + centred_by.to(tl.int64) * PADDED + dims)[None, :]
    inverse = tl.where(real, inverse_or_zero(tl.math.sqrt_rn(tl.sum(centred * centred, 1)), 1.0), 0.0)
    unit_sum = tl.sum(centred * inverse[:, None], 0)
    similarity = tl.sum(unit_sum * unit_sum, 0) / (length * length)
    tl.store(similarity_ptr + program, tl.where(flags == 0, similarity, float("nan")))

    if QUANTIZED:
        centre = tl.load(centre_ptr + kv_head.to(tl.int64) * PADDED + dims)
        # Read again, from L1: to keep it would take twice the registers.
        k = load_tile(
            k_ptr, batch, head, k_batch, k_head, k_token, k_dim, rows, dims, k_len, UNIT, DIM, PADDED, ""
        )  # [64, D']
        centred = k - centre[None, :]
        row_largest = tl.where(real, tl.max(tl.abs(centred), 1), 0.0)
        largest = tl.max(row_largest, 0)
        scale, exact = int8_scale(largest)
        exact = exact | (largest > OUTLIER_RATIO * (tl.sum(row_largest, 0) / length))
        exact = exact | (largest > OFFSET_RATIO * own_largest)
        # tl.max passes over a NaN: it is in K, which the flags know, or in the centre.
        exact = exact | ((flags & NON_FINITE_K) != 0) | (all_finite(centre) == 0)
        inverse = tl.where(real, inverse_or_zero(scale, 1.0), 0.0)
        codes = tl.where(exact, 0, round_codes(centred, inverse[:, None]))
        code_rows = program.to(tl.int64) * K_TILE + tl.arange(0, K_TILE)
        tl.store(codes_ptr + code_rows[:, None] * PADDED + dims[None, :], codes)
        tl.store(scale_ptr + program, tl.where(exact, 0.0, scale))
        tl.store(flags_ptr + program, (flags | tl.where(exact, NOT_INT8, 0)).to(tl.int8))
