"""The operator's contract: schema, fake, strides, refusals, autograd, autocast, statistics, compilation."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEFAULT, HALF, KEEP_ALL, both_causal, dense, random_qkv, relative_l1
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparge_kernels import ops
from sparge_kernels.thresholds import pack

attention = torch.ops.sparge.attention.default
with_stats = torch.ops.sparge.attention_with_stats.default
both_operators = pytest.mark.parametrize("operator", [attention, with_stats], ids=["plain", "with-stats"])
THRESHOLDS = pack([HALF])


@both_operators
@both_causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(operator, is_causal, dtype):
    q, k, v = random_qkv(70, 90, heads=4, kv_heads=2, dtype=dtype, value_dim=8)
    options = {"thresholds": THRESHOLDS, "is_causal": is_causal, "enable_gqa": True}
    with torch.no_grad():
        torch.library.opcheck(operator, (q, k, v), options)


@pytest.mark.parametrize("layout", [[0, 2, 1, 3], [0, 1, 2, 3]], ids=["tokens-first", "heads-first"])
@pytest.mark.parametrize("shape", [(2, 3, 70, 16), (1, 1, 1, 1), (2, 3, 0, 16)], ids=str)
def test_fake_strides_are_the_real_strides(layout, shape):
    q, k, v = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    real = with_stats(q.transpose(0, 0), k, v, thresholds=THRESHOLDS, layout=layout)
    meta = with_stats(*(x.to("meta") for x in (q, k, v)), thresholds=THRESHOLDS, layout=layout)
    for actual, fake in zip(real, meta, strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert real[0].permute(layout).is_contiguous()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break_and_keeps_strides(dynamic):
    def block(x):
        q = x.unflatten(2, (3, 16)).transpose(1, 2)
        return attention(q * 2, q, q, thresholds=THRESHOLDS, is_causal=True).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (70, 150):
            x = torch.randn(2, tokens, 48)
            torch.testing.assert_close(compiled(x), block(x))
            assert compiled(x).stride() == block(x).stride()


@both_causal
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors_do_what_sdpa_does(is_causal, shape):
    batch, heads, q_len, k_len = shape
    q, k = torch.randn(batch, heads, q_len, 8), torch.randn(batch, heads, k_len, 8)
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11's CPU flash kernel dies of zero heads
        expected = F.scaled_dot_product_attention(q, k, k, is_causal=is_causal)
    output, density, pv_skipped = with_stats(q, k, k, thresholds=THRESHOLDS, is_causal=is_causal)
    assert torch.equal(output, expected)
    assert (density == 1).all() and (pv_skipped == 0).all()


@both_causal
@pytest.mark.parametrize("scale", [None, -0.3, 0.0], ids=lambda scale: f"scale-{scale}")
def test_short_calls_run_dense_into_the_same_layout(is_causal, scale):
    q, k, v = random_qkv(100, 120)
    options = {"thresholds": THRESHOLDS, "is_causal": is_causal, "scale": scale}
    output, density, pv_skipped = with_stats(q, k, v, min_tokens=101, **options)
    torch.testing.assert_close(output.double(), dense(q, k, v, is_causal, scale), rtol=1e-5, atol=1e-5)
    assert output.stride() == attention(q, k, v, **options).stride()
    assert density.tolist() == [[1, 1]] and pv_skipped.tolist() == [[0, 0]]
    sparse = attention(q, k, v, min_tokens=100, **options)
    assert torch.equal(sparse, attention(q, k, v, **options))


def _call(**changes):
    q, k, v = random_qkv(8, 8)
    call = {"query": q, "key": k, "value": v, "thresholds": THRESHOLDS} | changes
    return lambda: attention(call.pop("query"), call.pop("key"), call.pop("value"), **call)


REFUSED = {
    "three-dims": ({"query": torch.randn(2, 8, 16)}, ValueError, "query has shape"),
    "float64": (dict.fromkeys(("query", "key", "value"), torch.randn(1, 2, 8, 16).double()), TypeError, "float32"),
    "mixed-dtypes": ({"key": torch.randn(1, 2, 8, 16).bfloat16()}, TypeError, "key torch.bfloat16"),
    "mixed-devices": ({"key": torch.empty(1, 2, 8, 16, device="meta")}, ValueError, "one device"),
    "head-dim": ({"key": torch.randn(1, 2, 8, 8)}, ValueError, "head_dim of query and key"),
    "large-head-dim": (dict.fromkeys(("query", "key"), torch.randn(1, 2, 8, 257)), ValueError, "257"),
    "key-count": ({"key": torch.randn(1, 2, 9, 16)}, ValueError, "number of keys"),
    "batch": ({"query": torch.randn(2, 2, 8, 16)}, ValueError, "batch size"),
    "gqa-not-enabled": ({"query": torch.randn(1, 4, 8, 16)}, ValueError, "enable_gqa=True"),
    "gqa-no-multiple": ({"query": torch.randn(1, 3, 8, 16), "enable_gqa": True}, ValueError, "multiples"),
    "fp8": ({"precision": "fp8"}, ValueError, "no kernel yet"),
    "unknown-precision": ({"precision": "int4"}, ValueError, "int8, none"),
    "layout": ({"layout": [0, 1, 1, 3]}, ValueError, "permutation"),
    "thresholds": ({"thresholds": [0.0, 1.0]}, ValueError, "2 numbers"),
}


@pytest.mark.parametrize("changes, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_call_is_refused_with_its_reason(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)()


def test_static_checks_give_reasons_not_errors():
    cpu = torch.device("cpu")
    assert ops.check_static(64, 256, torch.bfloat16, cpu) is None
    assert "257" in ops.check_static(257, 64, torch.float32, cpu)
    assert "float64" in ops.check_static(64, 64, torch.float64, cpu)
    assert ops.supported_device(cpu) is None
    assert "no kernel" in ops.supported_device(torch.device("xpu"))


@both_operators
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_a_needed_gradient_is_an_error_and_no_grad_is_not(operator, which):
    tensors = list(random_qkv(8, 8))
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no backward.*no_grad"):
        operator(*tensors, thresholds=THRESHOLDS)
    with torch.no_grad():
        operator(*tensors, thresholds=THRESHOLDS)


def test_ambient_autocast_changes_nothing():
    q, k, v = random_qkv(150, 150)
    plain = attention(q, k, v, thresholds=THRESHOLDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, thresholds=THRESHOLDS), plain)


def test_recorded_stats_name_the_site_and_how_it_ran():
    q, k, v = random_qkv(300, 300)
    with ops.record_stats() as records:
        attention(q, k, v, thresholds=THRESHOLDS, site="blocks.0")
        attention(q, k, v, thresholds=THRESHOLDS, site="blocks.1", min_tokens=1000)
    attention(q, k, v, thresholds=THRESHOLDS, site="outside")
    assert [(r.site, r.ran, r.density.shape) for r in records] == [
        ("blocks.0", "sparse", (1, 2)),
        ("blocks.1", "dense", (1, 2)),
    ]
    assert records[0].density.max() < 1 and records[1].density.min() == 1


def test_stats_of_one_thread_do_not_show_in_another():
    q, k, v = random_qkv(8, 8)
    with ops.record_stats() as records:
        other = threading.Thread(target=lambda: attention(q, k, v, thresholds=THRESHOLDS))
        other.start()
        other.join()
    assert records == []


def test_nested_recording_restores_the_outer_list_after_an_error():
    q, k, v = random_qkv(8, 8)
    with ops.record_stats() as outer:
        with pytest.raises(KeyError), ops.record_stats():
            raise KeyError
        attention(q, k, v, thresholds=THRESHOLDS, site="outer")
    assert [record.site for record in outer] == ["outer"]


@pytest.mark.parametrize("head_dim", [1, 3, 40, 72, 256])
def test_any_head_dim_up_to_256(head_dim):
    q, k, v = random_qkv(130, 130, heads=1, dim=head_dim, value_dim=257 - head_dim)
    output = attention(q, k, v, thresholds=pack([KEEP_ALL]))
    assert relative_l1(output, dense(q, k, v)) < 0.02
    assert attention(q, k, v, thresholds=pack([DEFAULT])).shape == (1, 1, 130, 257 - head_dim)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_the_default_dtype_of_the_process_changes_nothing(default):
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    options = {"thresholds": pack([KEEP_ALL]), "is_causal": True}
    expected = torch.ops.sparge.attention_with_stats.default(q, k, v, **options)
    torch.set_default_dtype(default)
    try:
        result = torch.ops.sparge.attention_with_stats.default(q, k, v, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(result, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
