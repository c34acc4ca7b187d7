"""Masks of attention written out: read, proven, given to the kernel; rows with nothing open mean what they meant."""

import math

import pytest
import torch
from light import CLOSE, is_rewritten, qkv

LOWEST = torch.finfo(torch.float32).min
NAN_TOO = {**CLOSE, "equal_nan": True}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def scores(q, k):
    return q @ k.mT * 0.3


def ones(q, k):
    return torch.ones(q.shape[2], k.shape[2])


CAUSAL = {
    "tril-equals-zero": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril() == 0, -math.inf),
    "finite-fill": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril() == 0, -1e9),
    "view-of-tril": lambda q, k: scores(q, k).masked_fill(
        ones(q, k).tril().view(1, 1, q.shape[2], k.shape[2]) == 0, -1e4
    ),
    "tril-not-one": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril() != 1, -math.inf),
    "tril-below-one": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril() < 1, -math.inf),
    "triu": lambda q, k: scores(q, k).masked_fill(ones(q, k).triu(1).bool(), -math.inf),
    "triu-equals-one": lambda q, k: scores(q, k).masked_fill(torch.triu(ones(q, k), diagonal=1) == 1, -math.inf),
    "triu-integers": lambda q, k: scores(q, k).masked_fill(ones(q, k).int().triu(1) > 0, -math.inf),
    "boolean": lambda q, k: scores(q, k).masked_fill(~ones(q, k).bool().tril(), -math.inf),
    "where": lambda q, k: torch.where(ones(q, k).bool().tril(), scores(q, k), -math.inf),
    "where-hidden": lambda q, k: torch.where(ones(q, k).bool().triu(1), -1e9, scores(q, k)),
    "where-method": lambda q, k: scores(q, k).where(ones(q, k).bool().tril(), LOWEST),
    "added": lambda q, k: scores(q, k) + torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1),
    "added-first": lambda q, k: torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1) + scores(q, k),
    "extended": lambda q, k: scores(q, k) + (1.0 - ones(q, k).tril()[None, None]) * LOWEST,
    "transposed": lambda q, k: scores(q, k).masked_fill(~(ones(q, k).triu() == 1).transpose(0, 1), -math.inf),
    "positions": lambda q, k: scores(q, k).masked_fill(
        torch.arange(k.shape[2])[None] > torch.arange(q.shape[2])[:, None], -math.inf
    ),
    "in-place": lambda q, k: scores(q, k).masked_fill_(ones(q, k).triu(1).bool(), -math.inf),
}


@pytest.mark.parametrize("masked", CAUSAL.values(), ids=CAUSAL.keys())
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_causal_mask_built_in_the_graph_is_recognised(masked, dynamic):
    q, k, v = qkv(tokens=21)
    for x in (q, k, v) if dynamic else ():
        torch._dynamo.mark_dynamic(x, 2)
    backend = is_rewritten(lambda q, k, v: masked(q, k).softmax(-1) @ v, q, k, v)
    (node,) = backend.operators()
    assert node.kwargs["is_causal"] and node.kwargs.get("attn_mask") is None


NOT_CAUSAL = {
    "diagonal-1": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril(1) == 0, -math.inf),
    "diagonal-minus-1": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril(-1) == 0, -math.inf),
    "upper": lambda q, k: scores(q, k).masked_fill(ones(q, k).triu() == 0, -math.inf),
    "wrong-way": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril() == 1, -math.inf),
    "wrong-way-round": lambda q, k: torch.where(ones(q, k).tril().bool(), -1e9, scores(q, k)),
    "flipped": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril().flip(0) == 0, -math.inf),
    "transposed": lambda q, k: scores(q, k).masked_fill((ones(k, q).tril() == 0).transpose(0, 1), -math.inf),
    "to-the-right": lambda q, k: scores(q, k).masked_fill(ones(q, k).tril(k.shape[2] - q.shape[2]) == 0, -math.inf),
    "reshaped": lambda q, k: scores(q, k).masked_fill(
        torch.ones(q.shape[2] * 2, k.shape[2] // 2).tril().view(q.shape[2], k.shape[2]) == 0, -math.inf
    ),
    "weakened": lambda q, k: scores(q, k) + (1.0 - ones(q, k).tril()) * -3.0,
    "all-hidden-twice": lambda q, k: scores(q, k).masked_fill(ones(q, k) == 1, -1e9),
}


@pytest.mark.parametrize("masked", NOT_CAUSAL.values(), ids=NOT_CAUSAL.keys())
def test_a_mask_that_is_nearly_causal_is_given_to_the_kernel(masked):
    q, k, v = qkv(tokens=12, keys=16)
    backend = is_rewritten(lambda q, k, v: masked(q, k).softmax(-1) @ v, q, k, v, tolerance=NAN_TOO)
    (node,) = backend.operators()
    assert not node.kwargs["is_causal"] and node.kwargs["attn_mask"] is not None


PADDING = {
    "some": torch.arange(12) < torch.tensor([12, 5])[:, None],
    "nothing-open": torch.arange(12) < torch.tensor([12, 0])[:, None],
    "scattered": torch.arange(24).view(2, 12) % 3 != 0,
}
HIDING = {
    "masked-fill": lambda s, m, c: s.masked_fill(~m[:, None, None, :], c),
    "where": lambda s, m, c: torch.where(m[:, None, None, :], s, c),
    "where-hidden": lambda s, m, c: torch.where(~m[:, None, None], c, s),
    "rows-too": lambda s, m, c: s.masked_fill(~(m[:, None, None, :] & m[:, None, :, None]), c),
    "twice": lambda s, m, c: s.masked_fill(~m[:, None, None, :], c).masked_fill(torch.ones(12, 12).triu(1).bool(), c),
    "in-statements": lambda s, m, c: s.masked_fill_(~m[:, None, None, :], c),
    "of-all-heads": lambda s, m, c: s.masked_fill(~m[:, None, None, :].expand(2, 2, 12, 12), c),
}


@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING.keys())
@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING.keys())
@pytest.mark.parametrize("fill", [-math.inf, LOWEST, -1e4], ids=["inf", "lowest", "finite"])
def test_padding_means_what_it_meant_in_rows_with_nothing_open_too(padding, hiding, fill):
    def attention(q, k, v, mask):
        return hiding(scores(q, k), mask, fill).softmax(-1) @ v

    q, k, v = qkv()
    is_rewritten(attention, q, k, v, padding, tolerance=NAN_TOO)


@pytest.mark.parametrize("fill", [-math.inf, -1e9], ids=["inf", "finite"])
@pytest.mark.parametrize("kv_heads", [1, 2], ids=["one-head", "two-heads"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_rows_with_nothing_open_are_right_for_grouped_heads(fill, kv_heads, dynamic):
    def attention(q, k, v, mask):
        k, v = k.repeat_interleave(4 // kv_heads, 1), v.repeat_interleave(4 // kv_heads, 1)
        return (scores(q, k).masked_fill(~mask[:, None, None, :], fill).softmax(-1) @ v).transpose(1, 2)

    q, k, v = qkv(heads=4, kv_heads=kv_heads)
    backend = is_rewritten(attention, q, k, v, PADDING["nothing-open"], tolerance=NAN_TOO, dynamic=dynamic)
    assert backend.sites[0].heads == 4


BIASES = {
    "of-heads": torch.linspace(-2, 2, 2 * 144).view(1, 2, 12, 12),
    "of-keys": torch.linspace(-2, 2, 12),
    "of-batch": torch.linspace(-2, 2, 24).view(2, 1, 1, 12),
    "three-dimensions": torch.linspace(-2, 2, 2 * 144).view(2, 12, 12),
    "closed-rows": torch.zeros(12, 12).index_fill(0, torch.tensor([0, 7]), -math.inf),
    "lowest-rows": torch.zeros(12, 12).index_fill(0, torch.tensor([0, 7]), LOWEST),
    "all-closed": torch.full((2, 1, 1, 12), -math.inf),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
def test_what_is_added_to_the_scores_is_added_by_the_kernel(bias):
    q, k, v = qkv()
    is_rewritten(lambda q, k, v, b: (scores(q, k) + b).softmax(-1) @ v, q, k, v, bias, tolerance=NAN_TOO)


def test_masks_of_every_kind_hold_together():
    def attention(q, k, v, bias, mask):
        s = scores(q, k) + bias
        s = s.masked_fill(~mask[:, None, None, :], -math.inf)
        return torch.where(torch.ones(12, 12).bool().tril(), s, -math.inf).softmax(-1) @ v

    for mask in PADDING.values():
        is_rewritten(attention, *qkv(), BIASES["of-heads"], mask, tolerance=NAN_TOO)


MERGED_MASKS = {
    "of-batch-and-heads": (torch.arange(4 * 12).view(4, 1, 12) % 5 != 0, lambda s: s),
    "of-all": (torch.arange(12) < 7, lambda s: s),
    "of-one": ((torch.arange(12) < 7).view(1, 1, 12), lambda s: s),
    "apart": ((torch.arange(24) % 5 != 0).view(2, 1, 1, 12), lambda s: s.view(2, 2, 12, 12)),
    "of-heads-apart": ((torch.arange(24) % 5 != 0).view(2, 1, 12), lambda s: s.view(2, 2, 12, 12)),
}


@pytest.mark.parametrize(("mask", "view"), MERGED_MASKS.values(), ids=MERGED_MASKS.keys())
def test_masks_of_batch_and_heads_in_one_dimension(mask, view):
    def attention(q, k, v, mask):
        q, k, v = (x.reshape(4, 12, 8) for x in (q, k, v))
        s = view(torch.bmm(q, k.transpose(1, 2))).masked_fill(~mask, -math.inf)
        return torch.bmm(s.view(4, 12, 12).softmax(-1), v)

    is_rewritten(attention, *qkv(), mask)


def test_a_mask_in_place_of_its_transpose_would_show():
    mask = (torch.arange(144) % 7 != 0).view(12, 12)
    is_rewritten(lambda q, k, v, m: scores(q, k).masked_fill(~m.mT, -1e9).softmax(-1) @ v, *qkv(), mask)
    is_rewritten(lambda q, k, v, m: scores(k, q).masked_fill(~m, -1e9).mT.softmax(-1) @ v, *qkv(), mask)
