"""Queries and keys of different lengths: cross-attention, prefill and decode over a cache, batches with padding."""

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, EXACT, LightBackend, is_rewritten, qkv
from torch import nn

SDPA = F.scaled_dot_product_attention
LENGTHS = [(1, 1), (1, 300), (3, 129), (200, 77), (77, 200), (130, 64)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_any_pair_of_lengths(lengths, is_causal, dynamic):
    q, k, v = qkv(tokens=lengths[0], keys=lengths[1])
    is_rewritten(lambda q, k, v: SDPA(q, k, v, is_causal=is_causal), q, k, v, dynamic=dynamic)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bottom_right_causality_is_a_mask(lengths):
    """What a cache with earlier keys needs; not SDPA's is_causal, which is aligned top-left."""
    q_len, k_len = lengths
    q, k, v = qkv(tokens=q_len, keys=k_len)

    def function(q, k, v):
        last = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        return SDPA(q, k, v, attn_mask=torch.arange(k.shape[2]) <= last)

    backend = is_rewritten(function, q, k, v)
    assert backend.operators()[0].kwargs["is_causal"] is (q_len == k_len and q_len > 1)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_batch_with_padding(dynamic):
    q, k, v = qkv(batch=3, tokens=150)
    lengths = torch.tensor([150, 70, 1])

    def function(q, k, v, lengths):
        seen = torch.arange(k.shape[2]) < lengths[:, None]
        return SDPA(q, k, v, attn_mask=seen[:, None, None, :])

    is_rewritten(function, q, k, v, lengths, dynamic=dynamic)


class Cached(nn.Module):
    """Attention that appends its keys and values to a cache of fixed size, and masks what is not filled yet."""

    def __init__(self, size: int = 140) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, size, 8))
        self.register_buffer("values", torch.zeros(1, 2, size, 8))

    def forward(self, q, k, v, position):
        at = position + torch.arange(q.shape[2])
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        seen = torch.arange(self.keys.shape[2]) <= at[:, None]
        return SDPA(q, self.keys, self.values, attn_mask=seen)


class Growing(nn.Module):
    """Attention over keys and values that grow by concatenation; causal from the end."""

    def forward(self, q, k, v):
        last = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        return SDPA(q, k, v, attn_mask=torch.arange(k.shape[2]) <= last)


def test_prefill_and_decode_over_a_cache_of_fixed_size():
    eager, model, backend = Cached(), Cached(), LightBackend(EXACT)
    compiled = torch.compile(model, backend=backend)
    q, k, v = qkv(batch=1, tokens=140)
    with torch.no_grad():
        for start, stop in [(0, 130), *((at, at + 1) for at in range(130, 138))]:
            parts = [x[:, :, start:stop] for x in (q, k, v)]
            expected, actual = (m(*parts, torch.tensor(start)) for m in (eager, compiled))
            torch.testing.assert_close(actual, expected, **CLOSE)
    assert all(backend.rewritten) and backend.compiles <= 3


def test_prefill_and_decode_over_a_cache_that_grows():
    eager, backend = Growing(), LightBackend(EXACT)
    compiled = torch.compile(Growing(), backend=backend)
    q, k, v = qkv(batch=1, tokens=140)
    with torch.no_grad():
        for start, stop in [(0, 130), *((at, at + 1) for at in range(130, 138))]:
            parts = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
            torch.testing.assert_close(compiled(*parts), eager(*parts), **CLOSE)
    assert all(backend.rewritten) and backend.compiles <= 3
