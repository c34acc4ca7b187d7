"""Near misses of attention written out: each stays dense to the bit, with its reason."""

import math

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, LightBackend, is_rewritten, lines, qkv, run, stays_dense
from torch import nn

MASK = torch.ones(12, 12, dtype=torch.bool).tril()
BIAS = torch.linspace(-1, 1, 144).view(12, 12)


def doubled(q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return torch.cat([weights @ v, weights], dim=-1)


def weights_summed(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum()


def scores_used(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean()


def scores_written_after(q, k, v):
    scores = q @ k.mT
    weights = scores.softmax(-1)
    weights.mul_(2.0)
    return weights @ v


def scores_read_before_they_are_written(q, k, v):
    scores = q @ k.mT
    before = scores.clone()
    scores.mul_(2.0)
    return scores.softmax(-1) @ v + before.sum()


def view_of_scores_written(q, k, v):
    scores = q @ k.mT
    scores[:, :, :, 0] = 3.0
    return scores.softmax(-1) @ v


def query_written_in_between(q, k, v):
    q = q + 0
    scores = q @ k.mT
    q.mul_(3.0)
    return scores.softmax(-1) @ v + q.sum()


def values_written_in_between(q, k, v):
    v = v + 0
    weights = (q @ k.mT).softmax(-1)
    v.mul_(3.0)
    return weights @ v


def mask_written_in_between(q, k, v):
    bias = BIAS + 0
    scores = q @ k.mT + bias
    bias.mul_(3.0)
    return scores.softmax(-1) @ v + bias.sum()


def custom_softmax(q, k, v):
    return torch.log_softmax(q @ k.mT, -1).exp() @ v


def heads_mixed(q, k, v):
    return torch.einsum("bhij,bgjd->bgid", (q @ k.mT).softmax(-1), v)


def grouped_einsum(q, k, v):
    q = q.unflatten(1, (1, 2))
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k[:, :1]).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", scores, v[:, :1])


def windows(q, k, v):
    scores = (q @ k.mT).view(1, 2, 2, 12, 12) + BIAS
    return scores.view(2, 2, 12, 12).softmax(-1) @ v


def scaled_by_a_tensor(q, k, v):
    return ((q @ k.mT) * q.mean()).softmax(-1) @ v


def scaled_by_a_tensor_of_heads(q, k, v):
    return ((q @ k.mT) * torch.tensor([1.0, 2.0]).view(2, 1, 1)).softmax(-1) @ v


def two_fills(q, k, v):
    return (q @ k.mT).masked_fill(MASK[:, :1], -1e9).masked_fill(~MASK, -1e5).softmax(-1) @ v


def filled_and_added_to(q, k, v):
    return ((q @ k.mT).masked_fill(~MASK[0], -1e9) + BIAS).softmax(-1) @ v


def rectangular_transposed(q, k, v):
    """Sums the weights over the queries."""
    return (q @ k.mT).softmax(-1).mT @ v


def shorter_map(q, k, v):
    return (q @ k.mT)[..., :6].softmax(-1) @ v[:, :, :6]


class Softcap(nn.Module):
    def forward(self, q, k, v):
        return (torch.tanh((q @ k.mT) / 5) * 5).softmax(-1) @ v


REFUSED = {
    "softcap": (Softcap(), "softcap"),
    "log-softmax": (custom_softmax, "log_softmax"),
    "sigmoid": (lambda q, k, v: torch.sigmoid(q @ k.mT - math.log(12)) @ v, "sigmoid"),
    "relu": (lambda q, k, v: (F.relu(q @ k.mT) / 12) @ v, "relu"),
    "clamp": (lambda q, k, v: (q @ k.mT).clamp(-5, 5).softmax(-1) @ v, "clamp"),
    "weights-returned": (weights_returned, "returned or used elsewhere"),
    "weights-summed": (weights_summed, "returned or used elsewhere"),
    "scores-used": (scores_used, "returned or used elsewhere"),
    "weights-written": (scores_written_after, "returned or used elsewhere"),
    "scores-read-then-written": (scores_read_before_they_are_written, "returned or used elsewhere"),
    "part-of-the-scores-written": (view_of_scores_written, "returned or used elsewhere"),
    "query-written": (query_written_in_between, "query may be written in place"),
    "mask-written": (mask_written_in_between, "mask may be written in place"),
    "tensor-scale": (scaled_by_a_tensor, "the scale is not a constant"),
    "scale-of-each-head": (scaled_by_a_tensor_of_heads, "the scale is not a constant"),
    "learned-temperature": (lambda q, k, v: ((q @ k.mT) / v.std()).softmax(-1) @ v, "the scale is not a constant"),
    "scaled-after-the-mask": (lambda q, k, v: ((q @ k.mT + BIAS) * 0.3).softmax(-1) @ v, "after they were masked"),
    "divided-into": (lambda q, k, v: (2.0 / (q @ k.mT)).softmax(-1) @ v, "divisor"),
    "subtracted": (lambda q, k, v: ((q @ k.mT) - BIAS).softmax(-1) @ v, "subtracted"),
    "number-added": (lambda q, k, v: ((q @ k.mT) + 1.0).softmax(-1) @ v, "not a tensor of floats"),
    "boolean-added": (lambda q, k, v: ((q @ k.mT) + MASK).softmax(-1) @ v, "not a tensor of floats"),
    "weighted-sum": (lambda q, k, v: torch.add(q @ k.mT, BIAS, alpha=2).softmax(-1) @ v, "arguments"),
    "rounded-division": (lambda q, k, v: torch.div(q @ k.mT, 2, rounding_mode="floor").softmax(-1) @ v, "arguments"),
    "filled-with-a-positive-number": (lambda q, k, v: (q @ k.mT).masked_fill(~MASK, 9.0).softmax(-1) @ v, "weight"),
    "filled-with-zero": (lambda q, k, v: (q @ k.mT * MASK).softmax(-1) @ v, "the scale is not a constant"),
    "filled-with-a-small-number": (lambda q, k, v: (q @ k.mT).masked_fill(~MASK, -9.0).softmax(-1) @ v, "weight"),
    "filled-with-a-tensor": (lambda q, k, v: torch.where(MASK, q @ k.mT, v.min()).softmax(-1) @ v, "constant number"),
    "filled-with-two-numbers": (two_fills, "two numbers"),
    "filled-and-added-to": (filled_and_added_to, "could mean anything"),
    "masked-after": (
        lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(~MASK, 0.0) @ v,
        "attention weights go through",
    ),
    "added-after": (lambda q, k, v: ((q @ k.mT).softmax(-1) + BIAS) @ v, "attention weights go through add"),
    "head-mask": (lambda q, k, v: ((q @ k.mT).softmax(-1) * 0.5) @ v, "attention weights go through mul"),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 1.0, training=True) @ v, "dropout is active"),
    "transposed-weights": (rectangular_transposed, "does not sum the attention weights over the keys"),
    "heads-mixed": (heads_mixed, "does not sum over one dimension"),
    "grouped-einsum": (grouped_einsum, "not understood"),
    "five-dimensions": (lambda q, k, v: (q[None] @ k[None].mT).softmax(-1) @ v[None], "5 dimensions"),
    "windows": (windows, "more than four dimensions"),
    "sliced-scores": (shorter_map, "no product of queries and keys"),
    "broadcast-ranks": (lambda q, k, v: (q @ k[0].mT).softmax(-1) @ v, "broadcasts"),
    "broadcast-batch": (lambda q, k, v: (q @ k[:1].mT).softmax(-1) @ v, "batch sizes"),
    "broadcast-values": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v[:, :1], "heads"),
    "broadcast-merged": (lambda q, k, v: torch.matmul((q[0] @ k[0, :1].mT).softmax(-1), v[0]), "broadcasts"),
    "wide-query": (lambda q, k, v: ((q.double() * 0.1) @ k.double().mT).softmax(-1).float() @ v, "lose digits"),
    "wide-key": (lambda q, k, v: (q.double() @ (k.double() * 0.1).mT).softmax(-1).float() @ v, "lose digits"),
    "wide-mask": (lambda q, k, v: (q @ k.mT + BIAS.double() / 3).softmax(-1).float() @ v, "lose digits"),
    "mask-grows-the-scores": (
        lambda q, k, v: ((q[:1] @ k[:1].mT) + BIAS.expand(3, 1, 12, 12)).softmax(-1) @ v[:1].expand(3, 2, 12, 8),
        "no product of queries and keys",
    ),
    "infinite-scale": (lambda q, k, v: ((q @ k.mT) * math.inf).softmax(-1) @ v, "the scale is inf"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_certain_stays_dense(function, reason):
    backend = stays_dense(function, *qkv(), reason=reason)
    assert backend.before[0] == lines(backend.graphs[0].graph)


def test_a_scale_of_the_wrong_type_of_number_is_guarded_on():
    """The compiled code is for one scale; another one compiles anew, and neither is wrong."""
    q, k, v = qkv()

    def attention(q, k, v, scale):
        return (q @ k.mT * scale).softmax(-1) @ v

    compiled = torch.compile(attention, backend=(backend := LightBackend()), dynamic=True)
    with torch.no_grad():
        for scale in (0.5, 0.25, 2, 3):
            torch.testing.assert_close(compiled(q, k, v, scale), attention(q, k, v, scale), **CLOSE)
    assert backend.sites


NARROWED = {
    "fill-of-fp32": lambda s, m: s.float().masked_fill(~m, torch.finfo(torch.float32).min).bfloat16().softmax(-1),
    "where-in-fp16": lambda s, m: torch.where(m, s.half(), -1e9).softmax(-1).bfloat16(),
}


@pytest.mark.parametrize("weights", NARROWED.values(), ids=NARROWED.keys())
def test_a_fill_that_becomes_infinite_in_a_narrower_type_gives_nan_in_closed_rows(weights):
    q, k, v = qkv(dtype=torch.bfloat16)
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[3] = False
    mask[:, 7:] = False

    def attention(q, k, v, mask):
        return weights(q @ k.mT * 0.3, mask) @ v

    backend = is_rewritten(attention, q, k, v, mask, tolerance={"rtol": 2e-2, "atol": 2e-2, "equal_nan": True})
    assert attention(q, k, v, mask).isnan().any() and len(backend.operators()) == 1


def test_a_mask_that_may_become_infinite_in_a_narrower_type_stays_dense():
    def attention(q, k, v):
        return (q @ k.mT + BIAS * 1e30).bfloat16().softmax(-1).float() @ v

    stays_dense(attention, *qkv(), reason="after a mask of")


def written_before(q, k, v):
    q, k = q + 0, k + 0
    q *= 0.3
    k.mul_(0.5)
    return (q @ k.mT).softmax(-1) @ v


def written_later(q, k, v):
    v = v + 0
    out = (q @ k.mT).softmax(-1) @ v
    v.mul_(2.0)
    return out + v


@pytest.mark.parametrize("attention", [written_before, written_later, values_written_in_between])
def test_writes_before_or_after_the_whole_call_do_no_harm(attention):
    is_rewritten(attention, *qkv())


NOT_OVER_KEYS = {
    "queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "heads": lambda q, k, v: (q @ k.mT).softmax(1) @ v,
    "batch": lambda q, k, v: F.softmax(q @ k.mT, dim=0) @ v,
    "einsum": lambda q, k, v: torch.einsum("bqkh,bkhd->bqhd", torch.einsum("bqhd,bkhd->bqkh", q, k).softmax(-1), v),
}


@pytest.mark.parametrize("function", NOT_OVER_KEYS.values(), ids=NOT_OVER_KEYS.keys())
def test_a_softmax_over_anything_but_the_keys_is_not_attention(function):
    stays_dense(function, *qkv(), reason="not")


def test_two_softmaxes_are_not_attention():
    q, k, v = qkv()
    out, backend = run(doubled, q, k, v)
    assert not any(backend.rewritten) and torch.equal(out, doubled(q, k, v))


def test_values_and_keys_of_one_shape_are_not_mixed_up():
    def swapped(q, k, v):
        return (q @ v.mT).softmax(-1) @ k

    (node,) = is_rewritten(swapped, *qkv()).operators()
    assert [argument.name for argument in node.args[:3]] != ["l_q_", "l_k_", "l_v_"]


def test_a_gradient_keeps_it_dense():
    q, k, v = (x.requires_grad_() for x in qkv())
    _, backend = run(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v, grad=True)
    assert backend.rewritten == [False] and "gradient" in backend.reason


def test_a_module_in_training_keeps_its_dropout():
    class Block(nn.Module):
        def forward(self, q, k, v):
            return F.dropout((q @ k.mT).softmax(-1), 0.1, training=self.training) @ v

    block = Block()
    assert not run(block.train(), *qkv())[1].sites[0].rewritten
    assert run(block.eval(), *qkv())[1].sites[0].rewritten
