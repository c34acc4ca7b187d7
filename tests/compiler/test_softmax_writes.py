"""Writes in place to what hand-written attention makes on its way, through whatever view: none is lost."""

import pytest
import torch
from light import is_rewritten, qkv, stays_dense
from softmax_programs import merged

from sparge_compile.matchers import softmax

S, SCALE = 12, 0.3


def scores(q, k):
    return q @ k.mT * SCALE


def scale_of_each_head(q, k, v):
    t = q.new_full((1, 2, 1, 1), 0.3)
    t[:, 0] = 0.9
    return ((q @ k.mT) * t).softmax(-1) @ v


def scale_of_each_key(q, k, v):
    t = torch.full((S,), 1.0)
    t[3:] = 0.0
    return ((q @ k.mT) * t).softmax(-1) @ v


def scale_through_a_view(q, k, v):
    t = torch.full((S,), 1.0)
    t.view(3, 4).mul_(torch.arange(4.0))
    return ((q @ k.mT) * t).softmax(-1) @ v


def scale_through_narrow(q, k, v):
    t = torch.full((S,), 1.0)
    t.narrow(0, 3, 4).zero_()
    return ((q @ k.mT) * t).softmax(-1) @ v


def fill_of_each_key(q, k, v):
    fill = torch.full((S,), -1e9)
    fill[3] = 0.0
    return torch.where(torch.ones(S, S).tril(-1).bool(), scores(q, k), fill).softmax(-1) @ v


def merged_values(q, k, v):
    q, k, v = (merged(x.transpose(1, 2).contiguous().transpose(1, 2)) for x in (q, k, v))
    v[:, 0] = 0.0
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def merged_queries_in_chunks(q, k, v):
    q, k, v = (merged(x.transpose(1, 2).contiguous().transpose(1, 2)) for x in (q, k, v))
    first, _ = q.chunk(2, -1)
    first.mul_(3.0)
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def rotary_of_a_part(q, k, v):
    q, k, v = (merged(x.transpose(1, 2).contiguous().transpose(1, 2)) for x in (q, k, v))
    q[..., :4].mul_(3.0)
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def merged_mask(q, k, v):
    mask = torch.linspace(-1, 1, 2 * S * S).view(2, S, S)
    mask = mask[:, None].expand(2, 2, S, S).reshape(4, S, S)
    mask[:, 0, :4] = -9.0
    return torch.bmm((torch.bmm(merged(q), merged(k).mT) + mask).softmax(-1), merged(v))


def widened_keys(q, k, v):
    q, k = q.float(), k.float()
    k[..., :4].mul_(-1)
    return scores(q, k).softmax(-1).to(v.dtype) @ v


def widened_mask(q, k, v):
    mask = (torch.arange(S) % 3 - 1).to(q.dtype).float()
    mask[:4].sub_(30)
    return ((q @ k.mT).float() + mask).softmax(-1).to(v.dtype) @ v


STAY_DENSE = {
    "scale-of-each-head": (scale_of_each_head, "may write in place to a tensor that the call makes"),
    "scale-of-each-key": (scale_of_each_key, "may write in place to a tensor that the call makes"),
    "scale-through-a-view": (scale_through_a_view, "may write in place to a tensor that the call makes"),
    "scale-through-narrow": (scale_through_narrow, "may write in place to a tensor that the call makes"),
    "fill-of-each-key": (fill_of_each_key, "may write in place to a tensor that the call makes"),
}
WIDENED = {
    "keys": (widened_keys, "the key is torch.float32, the output torch.bfloat16: it would lose digits"),
    "mask": (widened_mask, "the mask is torch.float32, the output torch.bfloat16: it would lose digits"),
}
# The part that is written is a view, which could have been read before.
PARTS = [merged_queries_in_chunks, rotary_of_a_part]
MERGED = [merged_values, merged_mask]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("attention", "reason"), STAY_DENSE.values(), ids=STAY_DENSE.keys())
def test_a_constant_that_was_written_to_is_none(attention, reason):
    stays_dense(attention, *qkv(), reason=reason)


@pytest.mark.parametrize(("attention", "reason"), WIDENED.values(), ids=WIDENED.keys())
def test_a_widened_copy_that_was_written_to_is_not_what_was_widened(attention, reason):
    stays_dense(attention, *qkv(dtype=torch.bfloat16), reason=reason)


@pytest.mark.parametrize("attention", MERGED)
def test_a_merged_copy_that_was_written_to_is_given_to_the_kernel_itself(attention):
    is_rewritten(attention, *qkv())


@pytest.mark.parametrize("attention", PARTS)
def test_a_merged_copy_of_which_a_part_was_written_to_is_not_what_was_merged(attention):
    stays_dense(attention, *qkv(), reason="the query may be written in place after a part of the call has read it")


EVERY = [*(attention for attention, _ in STAY_DENSE.values()), *PARTS, *MERGED]


@pytest.mark.parametrize("attention", EVERY)
def test_the_check_by_numbers_alone_sees_the_writes_too(attention, monkeypatch):
    monkeypatch.setattr(softmax, "writers", lambda _: {})  # the reading takes nothing for a write
    stays_dense(attention, *qkv(), reason="not proven equal")
