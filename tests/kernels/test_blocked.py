"""The blocked kernel selects the reference's tiles and gives its numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEFAULT,
    HALF,
    LAYOUTS,
    both_causal,
    both_precisions,
    dense,
    every_predictor,
    random_qkv,
    relative_l1,
    run_blocked,
    run_reference,
)

from sparge_kernels.cpu import blocked
from sparge_kernels.thresholds import NEVER_SKIP, PREDICTORS, Thresholds
from workloads import smooth_field

THRESHOLDS = st.builds(
    Thresholds,
    topk=st.none() | st.sampled_from([0.1, 0.5, 1.0]),
    cdf=st.sampled_from([0.3, 0.9, 1.0]),
    similarity=st.sampled_from([-1.0, 0.05, 0.5]),
    pv=st.sampled_from([None, NEVER_SKIP, -0.5, -4.0]),
)
# fp32: a tile mean that differs in its last bit can move an INT8 code by one.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_same(actual, expected, dtype=torch.float32):
    assert torch.equal(actual.density, expected.density)
    torch.testing.assert_close(actual.pv_skipped, expected.pv_skipped)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.output, expected.output, rtol=tolerance, atol=tolerance)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    q_len=st.integers(1, 300),
    k_len=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (3, 3), (3, 1), (4, 1), (8, 2), (7, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from([None, 1.0, 0.0, -0.4]),
    is_causal=st.booleans(),
    precision=st.sampled_from(["int8", "none"]),
    predictor=st.sampled_from(PREDICTORS),
    threshold=THRESHOLDS,
    seed=st.integers(0, 5),
)
def test_blocked_equals_the_reference(
    q_len, k_len, heads, dtype, layout, scale, is_causal, precision, predictor, threshold, seed
):
    tensors = random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], value_dim=12, dtype=dtype, seed=seed)
    q, k, v = (LAYOUTS[layout](x) for x in tensors)
    options = {"is_causal": is_causal, "scale": scale, "precision": precision, "predictor": predictor}
    actual = run_blocked(q, k, v, [threshold], **options)
    assert_same(actual, run_reference(q, k, v, [threshold], **options), dtype)


@every_predictor
@both_causal
@both_precisions
def test_blocked_equals_the_reference_on_a_smooth_field(is_causal, precision, predictor):
    q, k, v = smooth_field()
    options = {"is_causal": is_causal, "precision": precision, "predictor": predictor}
    actual = run_blocked(q, k, v, [DEFAULT], **options)
    assert_same(actual, run_reference(q, k, v, [DEFAULT], **options))
    assert actual.density.mean() < 0.8
    assert relative_l1(actual.output, dense(q, k, v, is_causal)) < 0.05


@both_precisions
@pytest.mark.parametrize("length", [64, 257, 300])
def test_the_running_state_survives_from_chunk_to_chunk(monkeypatch, precision, length):
    q, k, v = random_qkv(150, length)
    q = q * 4
    for tiles in (1, 2, 3):
        monkeypatch.setattr(blocked, "CHUNK_TILES", tiles)
        for threshold in (DEFAULT, HALF):
            actual = run_blocked(q, k, v, [threshold], precision=precision)
            assert_same(actual, run_reference(q, k, v, [threshold], precision=precision))


def test_stage_two_really_skips_and_agrees_with_the_reference():
    q, k, v = random_qkv(1, 3000)
    thresholds = [Thresholds(1.0, 1.0, -1.0, -0.3)]
    actual = run_blocked(q * 6, k, v, thresholds)
    assert_same(actual, run_reference(q * 6, k, v, thresholds))
    assert 0.2 < actual.pv_skipped.mean() < 1


def test_thread_count_does_not_change_the_tiles():
    q, k, v = smooth_field((1, 8, 128))
    one = run_blocked(q, k, v, [DEFAULT])
    torch.set_num_threads(2)
    two = run_blocked(q, k, v, [DEFAULT])
    assert_same(two, one)


def test_a_mask_is_dense_with_the_reason():
    q, k, v = random_qkv(8, 8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match="SPARGE_CPU_KERNEL=blocked takes no attn_mask"):
        result = run_blocked(q, k, v, [HALF], attn_mask=mask)
    assert torch.equal(result.output, F.scaled_dot_product_attention(q, k, v, mask)) and (result.density == 1).all()
