"""The operator's contract for attn_mask: schema, fake, refusals, autograd, the dense path, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import HALF, KEEP_ALL, random_qkv, relative_l1
from mask_cases import BOOL_MASKS, MASKS

from sparge_kernels.thresholds import pack

attention = torch.ops.sparge.attention.default
with_stats = torch.ops.sparge.attention_with_stats.default
both_operators = pytest.mark.parametrize("operator", [attention, with_stats], ids=["plain", "with-stats"])
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
THRESHOLDS = pack([HALF])


@both_operators
@pytest.mark.parametrize("mask", ["of-everything", "padding", "alibi", "key-bias-expanded", "transposed"])
def test_opcheck(operator, mask):
    q, k, v = random_qkv(70, 90, batch=2, heads=4, kv_heads=2, value_dim=8)
    options = {"thresholds": THRESHOLDS, "enable_gqa": True}
    with torch.no_grad():
        torch.library.opcheck(operator, (q, k, v, MASKS[mask](2, 4, 70, 90)), options)


REFUSED = {
    "integers": ({"attn_mask": torch.ones(1, 1, 8, 9, dtype=torch.int64)}, TypeError, "attn_mask is torch.int64"),
    "float64": ({"attn_mask": torch.ones(1, 1, 8, 9).double()}, TypeError, "bool and query's torch.float32"),
    "another-dtype": ({"attn_mask": torch.ones(1, 1, 8, 9).half()}, TypeError, "attn_mask is torch.float16"),
    "another-device": ({"attn_mask": torch.empty(1, 1, 8, 9, device="meta")}, ValueError, "on meta, query on cpu"),
    "two-dims": ({"attn_mask": torch.ones(8, 9, dtype=torch.bool)}, ValueError, r"\[1, 2, 8, 9\] is allowed"),
    "five-dims": ({"attn_mask": torch.ones(1, 1, 1, 8, 9)}, ValueError, "has shape"),
    "queries": ({"attn_mask": torch.ones(1, 1, 7, 9)}, ValueError, "has shape"),
    "keys": ({"attn_mask": torch.ones(1, 1, 8, 8)}, ValueError, "has shape"),
    "heads": ({"attn_mask": torch.ones(1, 3, 8, 9)}, ValueError, "has shape"),
    "batch": ({"attn_mask": torch.ones(2, 1, 8, 9)}, ValueError, "or 1 in place of any size"),
    "hiding-numbers": ({"attn_mask": torch.ones(1, 1, 8, 9), "mask_hides": True}, TypeError, "about bool masks"),
    "empty-rows": ({"attn_mask": torch.ones(1, 1, 8, 9), "empty_rows": "one"}, ValueError, "allowed: zero, nan, mean"),
    "causal": ({"attn_mask": torch.ones(1, 1, 8, 9), "is_causal": True}, ValueError, "put causality into the mask"),
}


@pytest.mark.parametrize("options, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_mask_is_refused_with_its_reason(options, error, message):
    options = dict(options)
    with pytest.raises(error, match=message):
        attention(*random_qkv(8, 9), options.pop("attn_mask"), thresholds=THRESHOLDS, **options)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"another-device"}))
def test_the_fake_refuses_the_same(name):
    options, error, message = REFUSED[name]
    q, k, v = (x.to("meta") for x in random_qkv(8, 9))
    options = dict(options)
    with pytest.raises(error, match=message):
        attention(q, k, v, options.pop("attn_mask").to("meta"), thresholds=THRESHOLDS, **options)


@both_operators
def test_a_mask_that_alone_needs_a_gradient_is_an_error_and_no_grad_is_not(operator):
    q, k, v = random_qkv(8, 8)
    mask = torch.randn(1, 1, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no backward.*no_grad"):
        operator(q, k, v, mask, thresholds=THRESHOLDS)
    with torch.no_grad():
        operator(q, k, v, mask, thresholds=THRESHOLDS)


@every_mask
def test_short_calls_run_dense_with_their_mask(mask):
    q, k, v = random_qkv(100, 120, batch=2)
    attn_mask = mask(2, 2, 100, 120)
    output, density, pv_skipped = with_stats(q, k, v, attn_mask, thresholds=THRESHOLDS, min_tokens=101)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, attn_mask))
    assert (density == 1).all() and (pv_skipped == 0).all()
    for scale in (-0.3, 0.0):
        output = attention(q, k, v, attn_mask, thresholds=THRESHOLDS, min_tokens=101, scale=scale)
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), _wide(attn_mask), scale=scale)
        assert relative_l1(output, expected) < 1e-5


def _wide(mask):
    return mask if mask.dtype == torch.bool else mask.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_short_and_long_calls_agree_on_the_finite_minimum(dtype):
    q, k, v = random_qkv(150, 150, dtype=dtype)
    mask = torch.zeros(1, 1, 150, 150, dtype=dtype).index_fill(2, torch.arange(70), torch.finfo(dtype).min)
    short = attention(q, k, v, mask, thresholds=pack([KEEP_ALL]), min_tokens=151)
    long = attention(q, k, v, mask, thresholds=pack([KEEP_ALL]))
    assert relative_l1(long, short) < 0.02


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors_with_a_mask_give_zeros(shape):
    batch, heads, q_len, k_len = shape
    q, k = torch.randn(batch, heads, q_len, 8), torch.randn(batch, heads, k_len, 8)
    mask = torch.ones(batch, heads, q_len, k_len, dtype=torch.bool)
    output, density, _ = with_stats(q, k, k, mask, thresholds=THRESHOLDS)
    assert output.shape == q.shape and (output == 0).all() and (density == 1).all()


def test_ambient_autocast_changes_nothing():
    q, k, v = random_qkv(150, 150)
    mask = MASKS["bias"](1, 2, 150, 150)
    plain = attention(q, k, v, mask, thresholds=THRESHOLDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, mask, thresholds=THRESHOLDS), plain)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_built_in_the_graph_compiles_without_a_break(dynamic, kind):
    def block(x, lengths):
        q = x.unflatten(2, (3, 16)).transpose(1, 2)
        seen = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None, :]
        mask = seen if kind == "bool" else torch.where(seen, 0.0, -torch.inf).expand(-1, 3, x.shape[1], -1)
        return attention(q * 2, q, q, mask, thresholds=THRESHOLDS).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (70, 150):
            x, lengths = torch.randn(2, tokens, 48), torch.tensor([tokens, tokens // 2])
            torch.testing.assert_close(compiled(x, lengths), block(x, lengths))
            assert compiled(x, lengths).stride() == block(x, lengths).stride()


@pytest.mark.parametrize("mask", BOOL_MASKS.values(), ids=BOOL_MASKS.keys())
def test_a_bool_mask_and_its_numbers_give_the_same_bits(mask):
    q, k, v = random_qkv(150, 200, batch=2)
    attn_mask = mask(2, 2, 150, 200)
    as_numbers = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    for actual, expected in zip(
        with_stats(q, k, v, as_numbers, thresholds=THRESHOLDS),
        with_stats(q, k, v, attn_mask, thresholds=THRESHOLDS),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("min_tokens", [0, 1000], ids=["sparse", "dense"])
@pytest.mark.parametrize("mask", BOOL_MASKS.values(), ids=BOOL_MASKS.keys())
def test_a_mask_that_hides_gives_the_bits_of_one_that_attends(mask, min_tokens):
    q, k, v = random_qkv(150, 200, batch=2)
    attn_mask = mask(2, 2, 150, 200)
    options = {"thresholds": THRESHOLDS, "min_tokens": min_tokens, "empty_rows": "mean"}
    expected = attention(q, k, v, attn_mask, **options)
    assert torch.equal(attention(q, k, v, ~attn_mask, mask_hides=True, **options), expected)


@pytest.mark.parametrize("min_tokens", [0, 1000], ids=["sparse", "dense"])
@pytest.mark.parametrize("kv_heads", [1, 2], ids=["one-kv-head", "two-kv-heads"])
@pytest.mark.parametrize("fill", ["zero", "nan", "mean"])
@every_mask
def test_rows_with_nothing_open_give_what_is_asked_and_no_other_changes(mask, fill, kv_heads, min_tokens):
    q, k, v = random_qkv(150, 200, batch=2, heads=4, kv_heads=kv_heads)
    attn_mask = mask(2, 4, 150, 200)
    options = {"thresholds": THRESHOLDS, "min_tokens": min_tokens, "enable_gqa": True}
    plain = attention(q, k, v, attn_mask, **options)
    closed = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
    empty = closed.expand(2, 4, 150, 200).all(-1, keepdim=True)
    mean = v.repeat_interleave(4 // kv_heads, 1).mean(2, keepdim=True)
    expected = torch.where(empty, {"zero": 0.0, "nan": torch.nan, "mean": mean}[fill], plain)
    actual = attention(q, k, v, attn_mask, empty_rows=fill, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.stride() == plain.stride()


@both_operators
@pytest.mark.parametrize("fill", ["nan", "mean"])
def test_opcheck_of_masks_that_hide_and_rows_with_nothing_open(operator, fill):
    q, k, v = random_qkv(70, 90, batch=2)
    hidden = ~MASKS["fully-masked-rows"](2, 2, 70, 90)
    options = {"thresholds": THRESHOLDS, "mask_hides": True, "empty_rows": fill}
    with torch.no_grad():
        # NaN equals nothing, itself included: the numbers are compared above.
        checks = ("test_schema", "test_faketensor") if fill == "nan" else torch.library._OPCHECK_DEFAULT_UTILS
        torch.library.opcheck(operator, (q, k, v, hidden), options, test_utils=checks)
