"""Causal masks as nn.MultiheadAttention and nn.TransformerEncoderLayer make them of what they are given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from light import is_rewritten, qkv


def future(q):
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)


def lowest(q):
    return torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1)


def filled_twice(q):
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill_(future(q), -torch.inf)
    return mask.masked_fill_(future(q).flip(0), -torch.inf)


def seen_before(q):
    mask = torch.zeros(q.shape[2], q.shape[2])
    view = mask[None]
    mask.masked_fill_(future(q), -torch.inf)
    return view


def filled_view(q):
    whole = torch.zeros(q.shape[2], q.shape[2])
    whole[:].masked_fill_(future(q), -torch.inf)
    return whole


def filled_out(q):
    whole = torch.ones(q.shape[2], q.shape[2])
    torch.zeros(q.shape[2], q.shape[2], out=whole).masked_fill_(future(q), -torch.inf)
    return whole


CAUSAL = {
    "zeros-like": lambda q: torch.zeros_like(future(q), dtype=torch.float32).masked_fill_(future(q), -torch.inf),
    "viewed": lambda q: lowest(q).view(1, 1, q.shape[2], q.shape[2]).expand(2, 2, -1, -1),
    "float-to-bool": lambda q: lowest(q).to(torch.bool).logical_not(),
    "filled-float-to-bool": lambda q: ~torch.zeros_like(lowest(q)).masked_fill_(future(q), -torch.inf).bool(),
}
OTHER = {
    "filled-twice": filled_twice,
    "seen-before": seen_before,
    "filled-view": filled_view,
    "filled-out": filled_out,
    "hidden-as-attended": lambda q: lowest(q).to(torch.bool).logical_or(torch.eye(q.shape[2], dtype=torch.bool)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mask", CAUSAL.values(), ids=CAUSAL.keys())
def test_a_causal_mask_is_recognised(mask, dynamic):
    q, k, v = qkv()
    backend = is_rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask(q)), q, k, v, dynamic=dynamic)
    (call,) = backend.operators()
    assert backend.sites[0].is_causal and "attn_mask" not in call.kwargs


@pytest.mark.parametrize("mask", OTHER.values(), ids=OTHER.keys())
def test_what_only_looks_like_it_goes_to_the_kernel_as_data(mask):
    q, k, v = qkv()
    backend = is_rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask(q)), q, k, v)
    (call,) = backend.operators()
    assert not backend.sites[0].is_causal and "attn_mask" in call.kwargs


def test_a_mask_that_is_reshaped_is_not_what_it_was():
    q, k, v = qkv(tokens=12, keys=3)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril().view(12, 3))

    with torch.no_grad():
        assert attend(q, k, v).isfinite().all()
    assert "attn_mask" in is_rewritten(attend, q, k, v).operators()[0].kwargs
