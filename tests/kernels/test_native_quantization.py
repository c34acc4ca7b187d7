"""The native kernel's INT8 codes, scales, exact flags and self-similarities are those of quantize.py and predict.py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KEEP_ALL, LAYOUTS, both_causal, random_qkv
from torch import Tensor

from sparge_kernels import predict, quantize
from sparge_kernels.cpu import native
from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import split_tiles, tile_count

LIGHT = settings(deadline=None, derandomize=True, max_examples=100)
INF, NAN = float("inf"), float("nan")
TIE = 1e-3  # a quotient this near to a half may round either way: the tile's mean is a sum of fp32 numbers
CLOSE = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}


@dataclass(frozen=True)
class Quantized:
    """One head of K and one query tile, as sparge_quantized gives them."""

    k_codes: Tensor  # int8 [Sk, D]
    k_scales: Tensor  # [nK]
    k_exact: Tensor  # bool [nK]
    k_similarity: Tensor  # [nK]
    q_codes: Tensor  # int8 [rows, D]
    q_scales: Tensor  # [rows]
    q_exact: Tensor  # bool [rows]
    q_similarity: Tensor  # []


def quantized(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, tile: int = 0, head: int = 0) -> Quantized:
    """The stage of one query head of batch 0."""
    call = native.describe(
        q,
        k,
        v,
        [KEEP_ALL] * q.shape[1],
        None,
        is_causal=is_causal,
        scale=0.3,
        precision="int8",
        out=torch.empty(0, 0, 0, 0),
    )
    dim, rows, count = q.shape[3], min(Q_TILE, q.shape[2] - tile * Q_TILE), tile_count(k.shape[2], K_TILE)
    results = (
        torch.empty(k.shape[2], dim, dtype=torch.int8),
        torch.empty(count),
        torch.empty(count, dtype=torch.bool),
        torch.empty(count),
        torch.empty(Q_TILE, dim, dtype=torch.int8),
        torch.empty(Q_TILE),
        torch.empty(Q_TILE, dtype=torch.bool),
        torch.empty(()),
    )
    indices = (0, head // (q.shape[1] // k.shape[1]), head)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in results]
    failed = native.library().sparge_quantized(
        ctypes.byref(call), *map(ctypes.c_int64, indices), ctypes.c_int(tile), *pointers
    )
    assert not failed
    *keys, q_codes, q_scales, q_exact, q_similarity = results
    return Quantized(*keys, q_codes[:rows], q_scales[:rows], q_exact[:rows], q_similarity)


def assert_codes_round(codes: Tensor, quotients: Tensor) -> None:
    """The codes [..., D] are the integers nearest to the fp64 quotients, either one near a tie."""
    assert ((codes.double() - quotients).abs() <= 0.5 + TIE).all()


def assert_same_codes(codes: Tensor, expected: Tensor, quotients: Tensor) -> None:
    difference = (codes.int() - expected.int()).abs()
    from_a_tie = ((quotients - quotients.floor()) - 0.5).abs()
    assert (difference <= (from_a_tie < TIE)).all()


def fp64_quotients(k: Tensor, scale: Tensor) -> Tensor:
    """(k - m_j) / scale_j of one head k [Sk, D], scale [nK]; 0 where the scale is 0."""
    k = k.double()
    centred = split_tiles(k, K_TILE) - predict.tile_means(k, K_TILE)[:, None]
    divisor = scale.double().masked_fill(scale == 0, INF)
    return (centred / divisor[:, None, None]).flatten(0, 1)[: len(k)]


@LIGHT
@given(
    q_len=st.integers(1, 300),
    k_len=st.integers(1, 300),
    dim=st.sampled_from([1, 3, 5, 16, 17, 40, 64, 72, 128, 256]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    offset=st.sampled_from([0.0, 3.0]),
    is_causal=st.booleans(),
    seed=st.integers(0, 5),
)
def test_codes_scales_flags_and_similarities(q_len, k_len, dim, heads, dtype, layout, offset, is_causal, seed):
    tensors = random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], dim=dim, value_dim=3, dtype=dtype, seed=seed)
    q, k, v = (LAYOUTS[layout](x + offset) for x in tensors)
    head, tile = seed % heads[0], seed % tile_count(q_len, Q_TILE)
    actual = quantized(q, k, v, is_causal=is_causal, tile=tile, head=head)
    q_head = q[0, head, tile * Q_TILE : (tile + 1) * Q_TILE].float()
    k_head = k[0, head // (heads[0] // heads[1])].float()

    rows = quantize.quantize_rows(q_head)
    assert torch.equal(actual.q_exact, rows.exact)
    torch.testing.assert_close(actual.q_scales, rows.scale, rtol=1e-6, atol=0)
    quotients = q_head.double() / rows.scale.double()[:, None]
    assert_codes_round(actual.q_codes, quotients)
    assert_same_codes(actual.q_codes, rows.codes, quotients)
    torch.testing.assert_close(actual.q_similarity, predict.self_similarity(q_head, Q_TILE)[0], **CLOSE)

    if layout == "one-token-expanded":  # what centring leaves of equal keys is rounding
        return
    tiles = quantize.quantize_tiles(k_head)
    assert torch.equal(actual.k_exact, tiles.exact)
    torch.testing.assert_close(actual.k_scales, tiles.scale, rtol=1e-4, atol=1e-8)
    quotients = fp64_quotients(k_head, tiles.scale)
    assert_codes_round(actual.k_codes, quotients)
    assert_same_codes(actual.k_codes, tiles.codes.flatten(0, 1)[:k_len], quotients)
    means = predict.tile_means(k_head, K_TILE)
    similarity = predict.self_similarity(k_head, K_TILE, predict.key_centres(means, k_len, is_causal))
    torch.testing.assert_close(actual.k_similarity, similarity, **CLOSE)


def _outlier(q, k, v):
    k[:, :, 70, 3] = 100


def _outlier_just_allowed(q, k, v):
    k[:, :, 70] *= 3


def _infinite_key(q, k, v):
    k[:, :, 10, 2] = -INF


def _nan_key_and_value(q, k, v):
    k[:, :, 10, 2], v[:, :, 130, 1] = NAN, NAN


def _sum_overflows(q, k, v):
    k[:, :, 64:128] = 2e38


def _difference_overflows(q, k, v):
    k[:, :, 64:96], k[:, :, 96:128] = 3e38, -3e38


def _subnormal_scales(q, k, v):
    q[:, :, 3] *= 1e-37
    k[:, :, 64:128] *= 1e-37


def _denormal(q, k, v):
    q[:, :, 3], k[:, :, 64:128] = 1e-45, 1e-40


def _zeros(q, k, v):
    q[:, :, 3:9], k[:, :, 64:128], k[:, :, 140:] = 0, 0, 0


def _not_finite_queries(q, k, v):
    q[:, :, 3, 1], q[:, :, 4, 15], q[:, :, 5] = NAN, INF, -INF


def _squares_overflow(q, k, v):
    q *= 1e25
    k *= 1e25


def _squares_underflow(q, k, v):
    q *= 1e-25
    k *= 1e-25


@both_causal
@pytest.mark.parametrize(
    "spoil",
    [
        _outlier,
        _outlier_just_allowed,
        _infinite_key,
        _nan_key_and_value,
        _sum_overflows,
        _difference_overflows,
        _subnormal_scales,
        _denormal,
        _zeros,
        _not_finite_queries,
        _squares_overflow,
        _squares_underflow,
    ],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_what_int8_cannot_hold_is_exact_and_spoils_no_other(spoil, is_causal):
    q, k, v = random_qkv(100, 170, heads=1)
    spoil(q, k, v)
    actual = quantized(q, k, v, is_causal=is_causal)
    rows, tiles = quantize.quantize_rows(q[0, 0]), quantize.quantize_tiles(k[0, 0])
    assert torch.equal(actual.q_exact, rows.exact) and torch.equal(actual.k_exact, tiles.exact)
    torch.testing.assert_close(actual.q_scales, rows.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.k_scales, tiles.scale, rtol=1e-5, atol=0)
    assert torch.equal(actual.q_codes, rows.codes)
    assert torch.equal(actual.k_codes, tiles.codes.flatten(0, 1)[:170])
    torch.testing.assert_close(actual.q_similarity, predict.self_similarity(q[0, 0], Q_TILE)[0], **CLOSE)
    means = predict.tile_means(k[0, 0], K_TILE)
    similarity = predict.self_similarity(k[0, 0], K_TILE, predict.key_centres(means, 170, is_causal))
    usable = predict.finite_tiles(k[0, 0], K_TILE) & predict.finite_tiles(v[0, 0], K_TILE) & means.isfinite().all(-1)
    torch.testing.assert_close(actual.k_similarity, similarity.masked_fill(~usable, NAN), **CLOSE)
