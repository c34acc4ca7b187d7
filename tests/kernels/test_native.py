"""The native kernel selects the reference's tiles, skips the same of them and gives its numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEFAULT,
    HALF,
    KEEP_ALL,
    LAYOUTS,
    both_causal,
    both_precisions,
    dense,
    every_dtype,
    every_predictor,
    kernel_error,
    random_qkv,
    relative_l1,
    run_native,
)
from mask_cases import BOOL_MASKS, FLOAT_MASKS
from stages import assert_same_stages, native_stages, reference_stages

from sparge_kernels.thresholds import NEVER_SKIP, PREDICTORS, Thresholds
from workloads import smooth_field

LIGHT = settings(deadline=None, derandomize=True, max_examples=120)
LENGTHS = st.integers(1, 300)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HEADS = st.sampled_from([(3, 3), (3, 1), (4, 1), (8, 2), (7, 1)])
DIMS = st.sampled_from([(16, 12), (1, 5), (3, 3), (40, 64), (64, 40), (17, 33), (5, 130)])
SCALES = st.sampled_from([None, 1.0, 0.0, -0.4])
PRECISIONS = st.sampled_from(["int8", "none"])
PREDICTOR = st.sampled_from(PREDICTORS)
THRESHOLDS = st.builds(
    Thresholds,
    topk=st.none() | st.sampled_from([0.1, 0.5, 1.0]),
    cdf=st.sampled_from([0.3, 0.9, 1.0]),
    similarity=st.sampled_from([-1.0, 0.05, 0.5]),
    pv=st.sampled_from([None, NEVER_SKIP, -0.5, -4.0]),
)


def inputs(q_len, k_len, heads, dims, dtype, layout, seed):
    tensors = random_qkv(
        q_len, k_len, batch=2, heads=heads[0], kv_heads=heads[1], dim=dims[0], value_dim=dims[1], dtype=dtype, seed=seed
    )
    if layout == "one-token-expanded":  # equal tiles rank by index, if their means are equal to the last bit
        tensors = tuple((x * 16).round() / 16 for x in tensors)
    return tuple(LAYOUTS[layout](x) for x in tensors)


@LIGHT
@given(
    q_len=LENGTHS,
    k_len=LENGTHS,
    heads=HEADS,
    dims=DIMS,
    dtype=DTYPES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=SCALES,
    is_causal=st.booleans(),
    precision=PRECISIONS,
    predictor=PREDICTOR,
    threshold=THRESHOLDS,
    seed=st.integers(0, 5),
)
def test_tiles_and_numbers_are_the_references(
    q_len, k_len, heads, dims, dtype, layout, scale, is_causal, precision, predictor, threshold, seed
):
    q, k, v = inputs(q_len, k_len, heads, dims, dtype, layout, seed)
    options = {"is_causal": is_causal, "scale": scale, "precision": precision, "predictor": predictor}
    assert_same_stages(q, k, v, [threshold], **options)


@LIGHT
@given(
    q_len=LENGTHS,
    k_len=LENGTHS,
    heads=HEADS,
    dims=DIMS,
    dtype=DTYPES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=SCALES,
    mask=st.sampled_from([*BOOL_MASKS.values(), *FLOAT_MASKS.values()]),
    same_dtype=st.booleans(),
    precision=PRECISIONS,
    predictor=PREDICTOR,
    threshold=THRESHOLDS,
    seed=st.integers(0, 5),
)
def test_tiles_and_numbers_under_a_mask_are_the_references(
    q_len, k_len, heads, dims, dtype, layout, scale, mask, same_dtype, precision, predictor, threshold, seed
):
    q, k, v = inputs(q_len, k_len, heads, dims, dtype, layout, seed)
    attn_mask = mask(2, heads[0], q_len, k_len)
    if same_dtype and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(dtype)
    options = {"attn_mask": attn_mask, "scale": scale, "precision": precision, "predictor": predictor}
    assert_same_stages(q, k, v, [threshold], **options)


@every_predictor
@both_causal
@both_precisions
def test_smooth_fields_have_the_same_tiles_and_numbers(is_causal, precision, predictor):
    q, k, v = smooth_field(heads=1)
    options = {"is_causal": is_causal, "precision": precision, "predictor": predictor}
    actual = assert_same_stages(q, k, v, [DEFAULT], **options)
    assert actual.density.mean() < 0.75
    assert relative_l1(actual.output, dense(q, k, v, is_causal)) < 0.05


@every_predictor
@pytest.mark.parametrize("gain", [1, 8, 50])
def test_tiles_rank_alike_however_sharp_the_scores(gain, predictor):
    q, k, v = smooth_field(heads=1)
    assert_same_stages(q * gain, k, v, [Thresholds(0.5, 1.0, -1.0, NEVER_SKIP)], predictor=predictor)


@every_predictor
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e30], ids=str)
def test_tiles_are_the_same_for_keys_of_any_magnitude(size, predictor):
    q, k, v = smooth_field((2, 6, 64))
    assert_same_stages(q / size, k * size, v, [DEFAULT], predictor=predictor)
    assert_same_stages(q / size, k * size, v, [HALF], is_causal=True, predictor=predictor)


@pytest.mark.parametrize("tiles", [range(1, 101), (600, 1400)], ids=["up-to-100", "many"])
@pytest.mark.parametrize("topk", ["0.01", "0.07", "0.09", "0.3", "0.55", "0.7"])
def test_the_share_that_is_kept_of_any_number_of_tiles(topk, tiles):
    for count in tiles:
        q, k, v = random_qkv(1, 64 * count, heads=1, dim=1)
        kept = native_stages(q, k, v, [Thresholds(float(topk), 1.0, -1.0, NEVER_SKIP)]).kept
        assert kept.sum() == math.ceil(Fraction(topk) * count)


@every_dtype
@both_causal
@both_precisions
@pytest.mark.parametrize("q_len, k_len", [(1, 1), (63, 257), (128, 64), (129, 65), (300, 70), (1, 1000)])
def test_keeping_all_is_dense_attention(dtype, is_causal, precision, q_len, k_len):
    q, k, v = random_qkv(q_len, k_len, heads=4, kv_heads=2, dim=40, value_dim=72, dtype=dtype)
    output = run_native(q, k, v, [KEEP_ALL], is_causal=is_causal, precision=precision).output
    assert relative_l1(output, dense(q, k, v, is_causal)) < (2e-2 if precision == "int8" else 5e-3)


@both_precisions
def test_stage_two_skips_what_the_reference_skips(precision):
    q, k, v = random_qkv(1, 3000)
    actual = assert_same_stages(q * 6, k, v, [Thresholds(1.0, 1.0, -1.0, -0.3)], precision=precision)
    assert 0.2 < actual.pv_skipped.mean() < 1


def test_a_skipped_tile_leaves_no_value_behind():
    q, k, v = (torch.zeros(1, 1, n, 16) for n in (128, 192, 192))
    q[..., 0], k[:, :, 64:128, 0], v[:, :, 64:128] = 1, -1, 1e30  # the tile in the middle is 4 nats below the others
    result = native_stages(q, k, v, [Thresholds(1.0, 1.0, -1.0, -3.9)], scale=4.0)
    assert result.pv_skipped.item() == pytest.approx(1 / 3)
    assert (result.output == 0).all()
    result = native_stages(q, k, v, [Thresholds(1.0, 1.0, -1.0, -4.1)], scale=4.0)
    assert result.pv_skipped.item() == 0
    assert (result.output > 1e27).all()


@both_precisions
@pytest.mark.parametrize("eps", [0.001, 0.1, 0.9])
def test_dropped_mass_stays_below_its_certificate(precision, eps):
    q, k, v = random_qkv(1, 1000)
    entry = Thresholds(1.0, 1.0, -1.0, math.log(eps / 1000))
    result = native_stages(q * 20, k, torch.ones_like(v), [entry], precision=precision)
    assert result.pv_skipped.min() > 0
    dropped = 1 - result.output
    assert dropped.max() <= eps + kernel_error(run_native, q.dtype, precision)
    expected = reference_stages(q * 20, k, torch.ones_like(v), [entry], precision=precision)
    difference = (dropped - expected.dropped_mass[..., None]).abs()
    assert difference.max() <= kernel_error(run_native, q.dtype, precision)


def test_only_tiles_that_were_computed_count_as_skipped():
    q, k, v = random_qkv(1, 640, heads=1)
    entry = Thresholds(0.5, 1.0, -1.0, -0.3)
    actual = assert_same_stages(q * 6, k, v, [entry])
    assert actual.density.item() == 0.5
    assert 0 < actual.pv_skipped.item() < 1


@every_dtype
@both_precisions
@pytest.mark.parametrize("k_len", [1, 4, 64, 200])
def test_a_sum_of_values_near_the_largest_number_does_not_overflow(dtype, precision, k_len):
    q, k, v = random_qkv(150, k_len, dtype=dtype)
    v = torch.full_like(v, 0.99 * torch.finfo(dtype).max)  # the flash kernel of SDPA gives inf
    output = run_native(q, k, v, [KEEP_ALL], precision=precision).output
    assert relative_l1(output / v.max(), torch.ones_like(output)) < 0.01
