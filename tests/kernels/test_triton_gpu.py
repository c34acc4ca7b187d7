"""What only a GPU can show: graph replay, compile modes, huge tensors, long sequences, several devices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEFAULT, HALF, KEEP_ALL, both_causal
from torch import nn

import sparge_compile as sparge
from sparge_kernels.thresholds import Thresholds, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def call(q, k, v, thresholds=HALF, **options):
    return torch.ops.sparge.attention.default(q, k, v, thresholds=pack([thresholds]), **options)


def qkv(tokens, *, heads=4, dim=64, dtype=torch.bfloat16, batch=1):
    return (torch.randn(batch, heads, tokens, dim, dtype=dtype, device="cuda") for _ in range(3))


def relative_l1(output, expected):
    return float((output.double() - expected.double()).abs().sum() / expected.double().abs().sum())


@pytest.mark.never_wrong(11, "gpu-direct")
@both_causal
@pytest.mark.parametrize("topk", [None, 0.37], ids=["thresholds-known", "thresholds-first-seen-in-the-capture"])
def test_a_captured_graph_replays_with_changed_inputs(is_causal, topk):
    q, k, v = qkv(1000)
    own = {"thresholds": DEFAULT if topk is None else Thresholds(topk, 1.0, -1.0, None)}
    call(q, k, v, DEFAULT, is_causal=is_causal)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(q, k, v, **own, is_causal=is_causal)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = list(qkv(1000))
        for old, new in zip((q, k, v), fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        replayed = output.clone()
        assert torch.equal(replayed, call(*fresh, **own, is_causal=is_causal))


@pytest.mark.never_wrong(11, "gpu-direct")
def test_no_call_waits_for_the_gpu():
    q, k, v = qkv(2000)
    mask = torch.ones(1, 1, 2000, 2000, dtype=torch.bool, device="cuda").tril()
    for attn_mask in (None, mask):
        call(q, k, v, DEFAULT, attn_mask=attn_mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for attn_mask in (None, mask):
            call(q, k, v, DEFAULT, attn_mask=attn_mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.never_wrong(11, "gpu-direct")
def test_a_table_of_thresholds_is_not_read_back_and_may_change_between_replays():
    q, k, v = qkv(2000)
    entries = [Thresholds((h + 1) / 5, 1.0, -1.0, None) for h in range(4)]
    operator = torch.ops.sparge.attention.default
    constants = [operator(q, k, v, thresholds=pack(order)) for order in (entries, entries[::-1])]
    tables = [torch.tensor(pack(order), dtype=torch.float64).view(4, 4).cuda() for order in (entries, entries[::-1])]
    table = tables[0].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = operator(q, k, v, None, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, constants[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator(q, k, v, None, table)
    for numbers, expected in zip(tables, constants, strict=True):
        table.copy_(numbers)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


@pytest.mark.never_wrong(11, "gpu-direct")
def test_calls_run_on_the_current_stream():
    q, k, v = qkv(1500)
    expected = call(q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        doubled = q * 1.0
        output = call(doubled, k, v)
    stream.synchronize()
    assert torch.equal(output, expected)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(128, 384)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.never_wrong(11, "gpu-compiled")
@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_compiled_models_in_every_mode(mode):
    torch.compiler.reset()
    model = Model().to("cuda", torch.bfloat16).eval()
    compiled = torch.compile(model, backend="sparge", mode=mode)
    with torch.no_grad(), sparge.rewriting(min_tokens=0, topk=1.0):
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(2, 1024, 128, dtype=torch.bfloat16, device="cuda")
            assert relative_l1(compiled(x), model(x)) < 0.02
    assert all(site.rewritten for site in sparge.last_report().sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_causal
def test_64k_tokens(dtype, is_causal):
    q, k, v = qkv(65536, heads=1, dim=128, dtype=dtype)
    output = call(q, k, v, KEEP_ALL, is_causal=is_causal)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=is_causal)
    assert relative_l1(output, expected) < 0.03


@pytest.mark.never_wrong(9, "gpu-direct")
def test_tensors_of_more_than_two_to_the_31_elements():
    heads, tokens, dim = 130, 2**18, 64  # 2.18e9 numbers each
    q, k, v = qkv(tokens, heads=heads, dim=dim)
    sparse = Thresholds(1e-6, 1.0, -1.0, -10.0)
    output = call(q, k, v, sparse)
    for head in (0, 129):
        alone = call(q[:, head : head + 1], k[:, head : head + 1], v[:, head : head + 1], sparse)
        assert torch.equal(output[:, head : head + 1], alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_than_the_current_device():
    q, k, v = (x.to("cuda:1") for x in qkv(500))
    assert relative_l1(call(q, k, v, KEEP_ALL), F.scaled_dot_product_attention(q, k, v)) < 0.02
