"""The CPU kernel selects the reference's tiles and gives its numbers, in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEFAULT,
    HALF,
    LAYOUTS,
    both_causal,
    both_precisions,
    dense,
    random_qkv,
    relative_l1,
    run_blocked,
    run_reference,
)
from workloads import smooth_field

from sparge_kernels.cpu import blocked
from sparge_kernels.thresholds import NEVER_SKIP, Thresholds

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
    threshold=THRESHOLDS,
    seed=st.integers(0, 5),
)
def test_blocked_equals_the_reference(q_len, k_len, heads, dtype, layout, scale, is_causal, precision, threshold, seed):
    tensors = random_qkv(q_len, k_len, heads=heads[0], kv_heads=heads[1], value_dim=12, dtype=dtype, seed=seed)
    q, k, v = (LAYOUTS[layout](x) for x in tensors)
    options = {"is_causal": is_causal, "scale": scale, "precision": precision}
    actual = run_blocked(q, k, v, [threshold], **options)
    assert_same(actual, run_reference(q, k, v, [threshold], **options), dtype)


@both_causal
@both_precisions
def test_blocked_equals_the_reference_on_a_smooth_field(is_causal, precision):
    q, k, v = smooth_field()
    actual = run_blocked(q, k, v, [DEFAULT], is_causal=is_causal, precision=precision)
    assert_same(actual, run_reference(q, k, v, [DEFAULT], is_causal=is_causal, precision=precision))
    assert actual.density.mean() < 0.75
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


@both_causal
@pytest.mark.parametrize("q_len, k_len", [(1, 1), (127, 64), (129, 65), (300, 70), (70, 300)])
def test_no_row_is_left_unwritten(monkeypatch, is_causal, q_len, k_len):
    def poisoned(allocate):
        return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_permuted", poisoned(torch.empty_permuted))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    result = run_blocked(*random_qkv(q_len, k_len, heads=3, batch=2), [HALF], is_causal=is_causal)
    for part in (result.output, result.density, result.pv_skipped):
        assert part.isfinite().all()


def test_thread_count_does_not_change_the_tiles():
    q, k, v = smooth_field((1, 8, 128))
    one = run_blocked(q, k, v, [DEFAULT])
    torch.set_num_threads(2)
    two = run_blocked(q, k, v, [DEFAULT])
    assert_same(two, one)


PEAK = """
import resource, torch
from sparge_kernels import ops
from sparge_kernels.thresholds import Thresholds, pack
torch.set_num_threads(1)
def run(q_len, k_len):
    q, k = torch.randn(1, 1, q_len, 16), torch.randn(1, 1, k_len, 16)
    torch.ops.sparge.attention.default(q, k, k, thresholds=pack([Thresholds(0.02, 1.0, -1.0, None)]))
run(256, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(32768, 32768)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_32k_tokens_allocate_no_score_matrix():
    # A 32k x 32k score matrix takes 4096 MiB in fp32, 1024 MiB even as int8.
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 200
