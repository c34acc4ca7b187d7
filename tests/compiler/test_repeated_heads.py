"""Keys and values repeated for grouped-query attention: the operator reads the unrepeated ones, or keeps off."""

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, qkv, run

BATCH, HEADS, GROUP, TOKENS, DIM = 2, 2, 3, 10, 8


def by_expand(x):
    return x[:, :, None, :, :].expand(BATCH, HEADS, GROUP, TOKENS, DIM).reshape(BATCH, HEADS * GROUP, TOKENS, DIM)


def by_unsqueeze(x):
    return x.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).reshape(BATCH, HEADS * GROUP, TOKENS, DIM)


def by_short_index(x):
    return x[:, :, None].expand(BATCH, HEADS, GROUP, TOKENS, DIM).reshape(BATCH, -1, TOKENS, DIM)


RECOGNISED = {
    "expand": by_expand,
    "unsqueeze": by_unsqueeze,
    "short-index": by_short_index,
    "method": lambda x: x.repeat_interleave(GROUP, 1),
    "function": lambda x: torch.repeat_interleave(x, repeats=GROUP, dim=1),
    "negative-dim": lambda x: x.repeat_interleave(GROUP, dim=-3),
    "output-size": lambda x: torch.repeat_interleave(x, GROUP, dim=1, output_size=HEADS * GROUP),
}
OTHER = {
    "tile": lambda x: x.repeat(1, GROUP, 1, 1),
    "torch-tile": lambda x: torch.tile(x, (1, GROUP, 1, 1)),
    "expand-before-heads": lambda x: (
        x[:, None].expand(BATCH, GROUP, HEADS, TOKENS, DIM).reshape(BATCH, -1, TOKENS, DIM)
    ),
    "concatenated": lambda x: torch.cat([x] * GROUP, dim=1),
    "expand-then-other-sizes": lambda x: (
        x[:, :, None]
        .expand(BATCH, HEADS, GROUP, TOKENS, DIM)
        .reshape(BATCH, HEADS * GROUP, DIM, TOKENS)
        .transpose(2, 3)
    ),
    "flipped": lambda x: x.repeat_interleave(GROUP, 1).flip(1),
    "per-head-counts": lambda x: x.repeat_interleave(torch.tensor([1, 5]), dim=1, output_size=6),
}


def check_equal_to_dense(function, *inputs):
    """The compiled function against the eager one, each on its own copies. Returns the backend."""
    with torch.no_grad():
        expected = function(*(x.clone() for x in inputs))
    out, backend = run(function, *(x.clone() for x in inputs))
    torch.testing.assert_close(out, expected, **CLOSE)
    return backend


@pytest.mark.parametrize("repeat", RECOGNISED.values(), ids=RECOGNISED.keys())
def test_the_operator_receives_unrepeated_keys_and_values(repeat):
    backend = check_equal_to_dense(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True),
        *qkv(batch=BATCH, heads=HEADS * GROUP, kv_heads=HEADS, tokens=TOKENS, dim=DIM),
    )
    (node,) = backend.operators()
    heads = [x.meta["example_value"].shape[1] for x in node.args]
    assert heads == [HEADS * GROUP, HEADS, HEADS] and node.kwargs["enable_gqa"] is True


@pytest.mark.parametrize("repeat", OTHER.values(), ids=OTHER.keys())
def test_another_order_of_heads_is_left_as_it_is(repeat):
    backend = check_equal_to_dense(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)),
        *qkv(batch=BATCH, heads=HEADS * GROUP, kv_heads=HEADS, tokens=TOKENS, dim=DIM),
    )
    for node in backend.operators():
        assert [x.meta["example_value"].shape[1] for x in node.args] == [HEADS * GROUP] * 3


def test_repetition_in_the_batch_or_along_tokens_is_not_taken_for_heads():
    def repeat_tokens(x):
        return x.repeat_interleave(GROUP, dim=2)

    q, k, v = qkv(batch=BATCH, heads=HEADS, tokens=TOKENS, dim=DIM)
    backend = check_equal_to_dense(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat_tokens(k), repeat_tokens(v)), q, k, v
    )
    (node,) = backend.operators()
    assert node.args[1].meta["example_value"].shape[2] == GROUP * TOKENS and not node.kwargs["enable_gqa"]


@pytest.mark.parametrize("counts", [(2, 3), (1, 6), (6, 1)], ids=str)
def test_keys_and_values_with_different_repetition_keep_their_copies(counts):
    q = torch.randn(BATCH, 6, TOKENS, DIM)
    k, v = (torch.randn(BATCH, 6 // n, TOKENS, DIM) for n in counts)
    check_equal_to_dense(
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k.repeat_interleave(counts[0], 1), v.repeat_interleave(counts[1], 1)
        ),
        q,
        k,
        v,
    )


WRITES = {
    "source": lambda x, packed: x.zero_(),
    "view-of-source": lambda x, packed: x[:, :, 0].fill_(5.0),
    "base-of-source": lambda x, packed: packed.zero_(),
    "other-view-of-base": lambda x, packed: packed.view(-1).mul_(3.0),
    "setitem-on-base": lambda x, packed: packed.__setitem__(slice(0, 1), 7.0),
    "item-assignment": lambda x, packed: _assign(packed),
    "augmented-assignment": lambda x, packed: _augment(packed),
    "functional-in-place": lambda x, packed: F.relu(x, inplace=True),
    "positional-in-place": lambda x, packed: F.relu(x, True),
    "out-argument": lambda x, packed: torch.neg(packed, out=packed),
    "foreach": lambda x, packed: torch._foreach_mul_([packed], 2.0),
    "explicit-dunder": lambda x, packed: x.__iadd__(1.0),
    "copy-into": lambda x, packed: x.copy_(torch.ones_like(x)),
    "detached-view": lambda x, packed: packed.detach().zero_(),
    "unbound-part": lambda x, packed: packed.unbind(0)[1].zero_(),
    "split-part": lambda x, packed: packed.split(1)[0].zero_(),
    "einsum-view": lambda x, packed: torch.einsum("abcd->abdc", x).zero_(),
}


def _assign(packed):
    packed[1:] = 2.0


def _augment(packed):
    packed *= 2.0


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_after_the_repetition_is_not_seen_by_the_attention(write):
    def function(q, packed):
        k = packed.view(BATCH, TOKENS, HEADS, DIM).transpose(1, 2)
        repeated = k.repeat_interleave(GROUP, 1)
        write(k, packed)
        return F.scaled_dot_product_attention(q, repeated, repeated)

    check_equal_to_dense(
        function, torch.randn(BATCH, HEADS * GROUP, TOKENS, DIM), torch.randn(BATCH, TOKENS, HEADS * DIM)
    )


def test_a_write_through_an_aliasing_input_is_not_seen_by_the_attention():
    def function(q, k, alias):
        repeated = k.repeat_interleave(GROUP, 1)
        alias.zero_()
        return F.scaled_dot_product_attention(q, repeated, repeated)

    q, k, _ = qkv(batch=BATCH, heads=HEADS * GROUP, kv_heads=HEADS, tokens=TOKENS, dim=DIM)
    expected = function(q, k.clone(), torch.zeros(3))
    out, _ = run(function, q, k, k.view(-1))
    torch.testing.assert_close(out, expected, **CLOSE)


def test_a_write_before_the_repetition_is_seen_by_the_attention():
    def function(q, k):
        k = k.mul_(2.0)
        repeated = k.repeat_interleave(GROUP, 1)
        return F.scaled_dot_product_attention(q, repeated, repeated)

    check_equal_to_dense(function, *qkv(batch=BATCH, heads=HEADS * GROUP, kv_heads=HEADS, tokens=TOKENS, dim=DIM)[:2])


def test_repetition_is_recognised_with_dynamic_lengths():
    def function(q, k, v):
        b, h, s, d = k.shape
        k, v = (x[:, :, None].expand(b, h, GROUP, s, d).reshape(b, h * GROUP, s, d) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = qkv(batch=BATCH, heads=HEADS * GROUP, kv_heads=HEADS, tokens=TOKENS, dim=DIM)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    out, backend = run(function, q, k, v)
    torch.testing.assert_close(out, function(q, k, v), **CLOSE)
    (node,) = backend.operators()
    assert node.args[1].meta["example_value"].shape[1] == HEADS
