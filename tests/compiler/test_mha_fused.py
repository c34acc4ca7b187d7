"""The fused operators of PyTorch's fast paths: what they compute is known, and their attention is rewritten."""

from __future__ import annotations

import itertools

import pytest
import torch
from light import CLOSE, lines, run
from opaque_calls import same_as_dense, stays_as_compiled
from torch import nn

from sparge_compile import dynamo
from sparge_compile.matchers import fused

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(12) >= torch.tensor([[10], [7]])
FUTURE = torch.ones(12, 12).triu(1).bool()
PER_HEAD = torch.stack([FUTURE, FUTURE.flip(0), FUTURE.flip(1), ~FUTURE]).view(2, 2, 12, 12)

IN_A_GRAPH = tuple(int(part) for part in torch.__version__.split(".")[:2]) > (2, 11)
DYNAMIC = pytest.mark.parametrize(
    "dynamic",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not IN_A_GRAPH, reason="TorchDynamo breaks the graph on 2.11")),
    ],
    ids=["static", "dynamic"],
)


def encoder(**arguments):
    return nn.TransformerEncoderLayer(16, 2, 24, **{"batch_first": True, **arguments}).eval()


GENERATOR = torch.Generator().manual_seed(3)
WEIGHTS = [torch.randn(shape, generator=GENERATOR) / 4 for shape in ((48, 16), (48,), (16, 16), (16,))]


def attention(query, key, value, mask, mask_type, need_weights=False):
    return torch._native_multi_head_attention(query, key, value, 16, 2, *WEIGHTS, mask, need_weights, True, mask_type)


@pytest.mark.parametrize("operator", fused.WRITTEN_OUT, ids=["layer", "attention"])
def test_every_variant_is_proven_equal_on_this_torch(operator):
    fused.is_proven.cache_clear()
    state = torch.random.get_rng_state()
    for mask_type, gelu, norm_first in itertools.product((None, 0, 1, 2), (False, True), (False, True)):
        assert fused.is_proven(operator, mask_type, gelu, norm_first)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("wrong", ["scale", "mask", "empty"])
def test_an_operator_that_computes_something_else_is_not_proven(wrong, monkeypatch):
    def other(*arguments):
        if wrong == "scale":
            return fused.multi_head_attention(*arguments) * 1.001
        if wrong == "mask":
            return dynamo.FUSED_MULTI_HEAD_ATTENTION(*arguments[:9], None, False, True, None)
        return fused.multi_head_attention(*arguments)  # 0 for a query without key, where the operator gives NaN

    fused.is_proven.cache_clear()
    monkeypatch.setitem(fused.WRITTEN_OUT, other, fused.multi_head_attention)
    assert not fused.is_proven(other, 1, False, False)
    assert fused.is_proven(dynamo.FUSED_MULTI_HEAD_ATTENTION, 1, False, False)


def test_a_fused_operator_that_is_not_proven_stays_dense(monkeypatch):
    monkeypatch.setattr(fused, "is_proven", lambda *_: False)
    backend = stays_as_compiled(encoder(), X)
    assert "could not be proven equal" in backend.reason


@DYNAMIC
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_an_encoder_layer_is_rewritten(norm_first, activation, dynamic):
    layer = encoder(norm_first=norm_first, activation=activation, layer_norm_eps=1e-3)
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    backend = same_as_dense(layer, X, dynamic=dynamic)
    assert "_transformer_encoder_layer_fwd" in " ".join(backend.before[0])
    (site,) = backend.sites
    assert (site.name, site.pattern, site.heads, site.head_dim) == ("TransformerEncoderLayer", "mha", 2, 8)


@DYNAMIC
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("given", ["padding", "square", "per-head", "both"])
def test_masks_of_an_encoder_layer_keep_their_meaning(given, floating, dynamic):
    layer = encoder()
    masks = {
        "padding": {"src_key_padding_mask": PADDING},
        "square": {"src_mask": FUTURE.flip(0)},
        "per-head": {"src_mask": PER_HEAD.flatten(0, 1)},
        "both": {"src_mask": FUTURE.flip(1), "src_key_padding_mask": PADDING},
    }[given]
    if floating:
        masks = {name: torch.zeros(mask.shape).masked_fill(mask, -torch.inf) for name, mask in masks.items()}
    names = list(masks)
    same_as_dense(lambda x, *m: layer(x, **dict(zip(names, m, strict=True))), X, *masks.values(), dynamic=dynamic)


@DYNAMIC
@pytest.mark.parametrize("spelling", ["bool", "float"])
def test_a_causal_mask_built_in_the_graph_is_recognised(spelling, dynamic):
    layer = encoder()

    def attend(x):
        length = x.shape[1]
        square = nn.Transformer.generate_square_subsequent_mask(length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        return layer(x, src_mask=square if spelling == "float" else future, is_causal=True)

    backend = same_as_dense(attend, X, dynamic=dynamic)
    (call,) = backend.operators()
    assert backend.sites[0].is_causal and "attn_mask" not in call.kwargs


@DYNAMIC
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_a_mask_that_is_repeated_for_every_head_is_computed_once(floating, dynamic):
    layer = encoder()
    mask = torch.zeros(12, 12).masked_fill(FUTURE.flip(1), -torch.inf) if floating else FUTURE.flip(1)
    backend = same_as_dense(lambda x, m: layer(x, src_mask=m), X, mask, dynamic=dynamic)
    (call,) = backend.operators()
    repeated = dynamo.example(call.kwargs["attn_mask"])
    assert repeated.shape == (2, 2, 12, 12) and repeated.stride()[:2] == (0, 0)
    computed = [node for node in backend.graphs[0].graph.nodes if "logical_not" in str(node.target)]
    assert len(computed) == 1 and dynamo.example(computed[0]).shape[:2] == (1, 1)


def test_a_float_mask_hides_whatever_is_not_zero():
    """As the fused operator does, odd as it is: an additive bias is no bias there."""
    layer = encoder()
    bias = torch.zeros(12, 12).masked_fill(FUTURE, 0.25)
    closed = torch.zeros(12, 12).masked_fill(FUTURE, -torch.inf)
    biased, hidden = (run(lambda x, m: layer(x, src_mask=m), X, mask)[0] for mask in (bias, closed))
    torch.testing.assert_close(biased, hidden)
    same_as_dense(lambda x, m: layer(x, src_mask=m), X, bias)


def test_queries_without_a_key_stay_nan():
    layer, padding = encoder(), PADDING.clone()
    padding[1] = True
    backend = same_as_dense(lambda x, m: layer(x, src_key_padding_mask=m), X, padding)
    out = backend.graphs and run(lambda x, m: layer(x, src_key_padding_mask=m), X, padding)[0]
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_a_transposed_input_gives_what_eager_gives():
    """Its fake claims the input's strides, the operator returns contiguous memory; Inductor stops at that by itself."""
    layer, x = encoder(), X.transpose(1, 2).contiguous().transpose(1, 2)
    stack = nn.Sequential(layer, encoder(norm_first=True)).eval()
    with torch.no_grad():
        expected = stack(x)
    out, backend = run(stack, x)
    assert backend.rewritten == [True, True]
    torch.testing.assert_close(out, expected, check_stride=True, **CLOSE)


MASKS = {
    "none": (None, None),
    "square": (FUTURE.flip(0), 0),
    "padding": (PADDING, 1),
    "per-head": (PER_HEAD, 2),
    "float": (torch.zeros(2, 12).masked_fill(PADDING, -torch.inf), 1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("need_weights", [False, True], ids=["no-weights", "weights-unused"])
def test_the_fused_attention_is_rewritten(mask, need_weights):
    tensor, mask_type = mask
    backend = same_as_dense(lambda x, m: attention(x, x, x, m, mask_type, need_weights)[0], X, tensor)
    assert backend.sites[0].heads == 2 and "_native_multi_head_attention" in " ".join(backend.before[0])


def test_the_fused_attention_of_three_inputs_is_rewritten():
    k, v = X.flip(1), X.flip(2)
    same_as_dense(lambda x, k, v: attention(x, k, v, None, None)[0], X, k, v)


def test_weights_of_the_fused_attention_that_are_used_keep_it_dense():
    backend = stays_as_compiled(lambda x: attention(x, x, x, None, None, True), X)
    assert "attention weights" in backend.reason


def test_an_unknown_mask_keeps_it_dense():
    backend = stays_as_compiled(lambda x, m: attention(x, x, x, m, 0)[0], X, PER_HEAD)
    assert "mask" in backend.reason


def test_a_layer_in_training_is_no_fused_call_and_stays_dense():
    layer = encoder(dropout=0.0).train()
    out, backend = run(layer, X, grad=True)
    assert "gradient" in backend.reason and backend.before == [lines(gm.graph) for gm in backend.graphs]
    out.sum().backward()
    found = layer.linear1.weight.grad.clone()
    layer.zero_grad()
    layer(X).sum().backward()
    assert torch.equal(found, layer.linear1.weight.grad)
