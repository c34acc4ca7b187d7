"""The native kernel gives equal bits for every number of threads, callers, heads and batches."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import DEFAULT, HALF, both_causal, both_precisions, every_dtype, random_qkv
from mask_cases import MASKS
from stages import Stages, native_stages

from sparge_kernels.thresholds import Thresholds

PER_HEAD = [Thresholds((h + 1) / 8, 1.0, -1.0, -2.0) for h in range(8)]


def gqa_inputs(dtype=torch.float32, seed=0):
    return random_qkv(400, 500, batch=2, heads=8, kv_heads=2, dim=24, value_dim=40, dtype=dtype, seed=seed)


def assert_equal_bits(actual: Stages, expected: Stages) -> None:
    for name in ("output", "density", "pv_skipped", "kept"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@every_dtype
@both_causal
@both_precisions
def test_equal_bits_for_every_thread_count_and_run(dtype, is_causal, precision):
    inputs = gqa_inputs(dtype)
    options = {"is_causal": is_causal, "precision": precision}
    expected = native_stages(*inputs, PER_HEAD, **options)
    for count in (1, 2, 8, 2):
        torch.set_num_threads(count)
        assert_equal_bits(native_stages(*inputs, PER_HEAD, **options), expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_equal_bits_for_every_thread_count_under_a_mask(mask):
    inputs, attn_mask = gqa_inputs(), mask(2, 8, 400, 500)
    expected = native_stages(*inputs, PER_HEAD, attn_mask=attn_mask)
    for count in (2, 8):
        torch.set_num_threads(count)
        assert_equal_bits(native_stages(*inputs, PER_HEAD, attn_mask=attn_mask), expected)


@pytest.mark.parametrize("mask", [None, "is_causal", "padding", "alibi", "of-everything"])
def test_a_head_of_a_batch_gives_the_same_bits_alone(mask):
    q, k, v = gqa_inputs()
    is_causal, mask = mask == "is_causal", MASKS.get(mask)
    attn_mask = mask(2, 8, 400, 500).expand(2, 8, 400, 500) if mask else None
    together = native_stages(q, k, v, PER_HEAD, is_causal=is_causal, attn_mask=attn_mask)
    for b in range(2):
        for h in range(8):
            one = (slice(b, b + 1), slice(h, h + 1))
            kv = (slice(b, b + 1), slice(h // 4, h // 4 + 1))
            own_mask = None if attn_mask is None else attn_mask[one]
            alone = native_stages(q[one], k[kv], v[kv], [PER_HEAD[h]], is_causal=is_causal, attn_mask=own_mask)
            parts = (together.output, together.density, together.pv_skipped, together.kept)
            assert_equal_bits(alone, Stages(*(part[one] for part in parts)))


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_in_four_threads_get_the_bits_they_get_alone(threads):
    calls = [(gqa_inputs(seed=seed), HALF if seed % 2 else DEFAULT) for seed in range(8)]
    expected = [native_stages(*inputs, [entry]) for inputs, entry in calls]

    def attend(call):
        torch.set_num_threads(threads)
        inputs, entry = call
        return native_stages(*inputs, [entry])

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            for actual, wanted in zip(pool.map(attend, calls), expected, strict=True):
                assert_equal_bits(actual, wanted)


def test_thread_count_of_the_process_is_untouched():
    torch.set_num_threads(2)
    native_stages(*gqa_inputs(), [HALF])
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert torch.get_num_threads() == 2 and seen == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_of_one_thread_runs():
    """As data loaders start theirs. With more threads OpenMP does not survive a fork, in torch's operators neither."""
    inputs = gqa_inputs()
    torch.set_num_threads(2)
    expected = native_stages(*inputs, [HALF])
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(native_stages(*inputs, [HALF]).output, expected.output) else 1)
    deadline = threading.Event()
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        deadline.wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
