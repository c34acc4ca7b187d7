"""Dynamic lengths: few compiles around one threshold, bounds of the user's respected, answers right at every length."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, EXACT, EXACT_FIELDS, LightBackend, qkv

import sparge_compile as sparge
from sparge_compile import Policy
from sparge_compile.thresholds import min_tokens
from sparge_kernels import ops

LENGTHS = (9, 30, 31, 32, 33, 40, 10, 64)  # none equals head_dim: TorchDynamo would take the two for one size


def run_lengths(function, make, lengths, *, minimum=32, **compile_options):
    """Calls a compiled function at each length, compares each answer, returns the backend."""
    backend = LightBackend(Policy(**{**EXACT_FIELDS, "min_tokens": minimum}))
    compiled = torch.compile(function, backend=backend, **compile_options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for length in lengths:
            inputs = make(length)
            torch.testing.assert_close(compiled(*inputs), function(*inputs), **CLOSE)
    return backend


def self_attention(x):
    return F.scaled_dot_product_attention(x, x, x)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def square(length):
    return (torch.randn(1, 2, length, 8),)


def test_eight_lengths_around_one_threshold_compile_at_most_twice():
    backend = run_lengths(self_attention, square, LENGTHS, dynamic=True)
    assert backend.compiles <= 2 and sorted(backend.rewritten) == [False, True]


@pytest.mark.parametrize("first", [9, 64], ids=["short-first", "long-first"])
def test_separate_q_k_and_v_compile_at_most_twice(first):
    backend = run_lengths(causal, lambda n: qkv(tokens=n), (first, *LENGTHS), dynamic=True)
    assert backend.compiles <= 2


def test_automatic_dynamic_settles():
    backend = run_lengths(causal, lambda n: qkv(tokens=n), (64, 40, 41, 42, 43, 44))
    assert backend.compiles == 2 and backend.rewritten == [True, True]


def test_each_variant_holds_exactly_on_its_side_of_the_threshold():
    backend = run_lengths(self_attention, square, (31, 32), dynamic=True)
    assert backend.rewritten == [False, True]


def test_causal_with_more_keys_or_more_queries_is_top_left():
    pairs = {10: (40, 70), 11: (70, 40), 12: (41, 41), 13: (33, 90)}

    def make(code):
        queries, keys = pairs[code]
        return qkv(tokens=queries, keys=keys)

    backend = run_lengths(causal, make, tuple(pairs), minimum=0, dynamic=True)
    assert all(backend.rewritten) and backend.compiles <= 2


def test_cross_attention_is_short_if_either_side_is():
    def make(code):
        return qkv(tokens=40, keys=8) if code == 10 else qkv(tokens=8, keys=40)

    backend = run_lengths(causal, make, (10, 11), dynamic=False)
    assert backend.rewritten == [False, False]


def test_bounds_of_mark_dynamic_are_respected_and_the_operator_decides_at_run_time():
    backend = LightBackend(Policy(**{**EXACT_FIELDS, "min_tokens": 32}))
    compiled = torch.compile(self_attention, backend=backend)
    with torch.no_grad():
        for length in (16, 31, 32, 100):
            x = torch.randn(1, 2, length, 8)
            torch._dynamo.mark_dynamic(x, 2, min=8, max=512)
            torch.testing.assert_close(compiled(x), self_attention(x), **CLOSE)
    (node,) = backend.operators()
    assert backend.compiles == 1 and node.kwargs["min_tokens"] == 32


def test_mark_dynamic_without_bounds_does_not_raise():
    def make(length):
        x = torch.randn(1, 2, length, 8)
        torch._dynamo.mark_dynamic(x, 2)
        return (x,)

    assert run_lengths(self_attention, make, (40, 50, 60)).compiles == 1


def test_bounds_that_settle_the_question_leave_nothing_for_run_time():
    x = torch.randn(1, 2, 64, 8)
    torch._dynamo.mark_dynamic(x, 2, min=40, max=512)
    backend = LightBackend(Policy(**{**EXACT_FIELDS, "min_tokens": 32}))
    with torch.no_grad():
        torch.compile(self_attention, backend=backend)(x)
    (node,) = backend.operators()
    assert node.kwargs["min_tokens"] == 0


def test_a_dynamic_batch_with_bounds_is_rewritten():
    q, k, v = qkv(batch=4)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 0, min=2, max=16)
    backend = LightBackend(EXACT)
    with torch.no_grad():
        out = torch.compile(causal, backend=backend)(q, k, v)
    torch.testing.assert_close(out, causal(q, k, v), **CLOSE)


def test_dynamic_heads_and_head_dim_are_fixed_by_guards():
    def make(code):
        heads, dim = divmod(code, 10)
        q = torch.randn(2, heads, 6, dim)
        for i in (1, 3):
            torch._dynamo.maybe_mark_dynamic(q, i)
        return (q,)

    backend = run_lengths(self_attention, make, (28, 38, 46), minimum=0)
    assert all(backend.rewritten)


def test_a_scale_from_a_dynamic_head_dim_is_the_callers():
    def function(q):
        return F.scaled_dot_product_attention(q, q, q, scale=2 / math.sqrt(q.shape[-1]))

    run_lengths(function, lambda dim: (torch.randn(1, 2, 6, dim),), (8, 12, 16), minimum=0, dynamic=True)


def test_a_length_that_depends_on_data_does_not_break_the_compile():
    def function(x, count):
        n = count.item()
        torch._check(n >= 2)
        torch._check(n <= x.shape[2])
        part = x[:, :, :n]
        return F.scaled_dot_product_attention(part, part, part)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        x = torch.randn(1, 2, 64, 8)
        run_lengths(function, lambda n: (x, torch.tensor(n)), (40, 8, 50), minimum=32)


def test_is_causal_computed_from_a_dynamic_length_follows_it():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)

    run_lengths(function, lambda n: qkv(tokens=n, keys=6), (5, 7, 1), minimum=0, dynamic=True)


def test_a_decode_step_over_a_growing_cache_stays_dense_and_right():
    def step(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    backend = run_lengths(step, lambda n: qkv(tokens=1, keys=n), (33, 34, 35, 36))
    assert backend.compiles <= 2 and not any(backend.rewritten)


def test_the_default_threshold_is_the_measured_break_even():
    limit = min_tokens(Policy(), torch.device("cpu"), "int8")
    assert limit == {"AVX-512 VNNI": 1024, "AVX2": 2048, None: 8192}[ops.int8_products(torch.device("cpu"))]
    x = torch.randn(1, 1, limit - 1, 1)
    backend = LightBackend(Policy())
    with torch.no_grad():
        torch.compile(self_attention, backend=backend)(x)
    assert f"{limit - 1} queries" in backend.reason and f"min_tokens is {limit}:" in backend.reason
    assert sparge.Policy().min_tokens is None
