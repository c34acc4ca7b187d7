"""nn.MultiheadAttention, one opaque node of a graph, is written out and its attention rewritten."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, LightBackend, lines, nodes_of, run
from opaque_calls import same_as_dense, stays_as_compiled
from torch import fx, nn

from sparge_compile import Policy, dynamo
from sparge_compile.matchers import find_sites

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(2))
PADDING = torch.arange(12) >= torch.tensor([[10], [7]])
FUTURE = torch.ones(12, 12).triu(1).bool()
ADDED = torch.linspace(-2, 2, 144).view(12, 12)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(12)

DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def mha(**arguments):
    return nn.MultiheadAttention(16, 2, **{"batch_first": True, **arguments}).eval()


def attends(layer, **arguments):
    """Self-attention as most models call it; without `need_weights` in the arguments they are not asked for."""
    arguments = {"need_weights": False, **arguments}
    return lambda x: layer(x, x, x, **arguments)[0]


@DYNAMIC
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_first": False},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"dropout": 0.5},
    ],
    ids=["default", "sequence-first", "no-bias", "bias-kv", "zero-attn", "bias-kv-zero-attn", "dropout-in-eval"],
)
def test_every_construction_is_rewritten(arguments, dynamic):
    backend = same_as_dense(attends(mha(**arguments)), X, dynamic=dynamic)
    (site,) = backend.sites
    assert (site.pattern, site.heads, site.head_dim, site.is_causal) == ("mha", 2, 8, False)
    assert not nodes_of(backend.graphs, F.multi_head_attention_forward)


@DYNAMIC
@pytest.mark.parametrize("sizes", [{}, {"kdim": 16, "vdim": 16}, {"kdim": 10, "vdim": 6}], ids=str)
def test_cross_attention_is_rewritten(sizes, dynamic):
    layer = mha(**sizes)
    key, value = Y[..., : sizes.get("kdim", 16)], Y[..., : sizes.get("vdim", 16)]
    backend = same_as_dense(lambda x, k, v: layer(x, k, v, need_weights=False)[0], X, key, value, dynamic=dynamic)
    if not dynamic:
        assert (backend.sites[0].q_len, backend.sites[0].k_len) == (12, 20)


def test_one_graph_serves_every_length():
    layer, backend = mha(), LightBackend()
    compiled = torch.compile(attends(layer), backend=backend, dynamic=True)
    with torch.no_grad():
        for batch, length in ((3, 12), (2, 30), (5, 65)):
            x = torch.randn(batch, length, 16)
            torch.testing.assert_close(compiled(x), attends(layer)(x), **CLOSE)
    assert backend.compiles == 1 and backend.rewritten == [True]


def test_a_length_that_the_caller_bounded_stays_dynamic():
    layer, x = mha(), X.clone()
    torch._dynamo.mark_dynamic(x, 1, min=2, max=4000)
    backend = same_as_dense(attends(layer), x)
    assert isinstance(backend.sites[0].q_len, str)


def test_an_unbatched_input_is_rewritten():
    same_as_dense(attends(mha()), X[0])


@pytest.mark.parametrize(
    "masks",
    [
        {"key_padding_mask": PADDING},
        {"key_padding_mask": torch.zeros(2, 12).masked_fill(PADDING, -1.5)},
        {"attn_mask": FUTURE.flip(0)},
        {"attn_mask": ADDED},
        {"attn_mask": torch.stack([FUTURE.flip(0), FUTURE, FUTURE, FUTURE.flip(1)])},
        {"attn_mask": FUTURE, "key_padding_mask": PADDING},
        {
            "attn_mask": CAUSAL,
            "is_causal": True,
            "key_padding_mask": torch.zeros(2, 12).masked_fill(PADDING, -torch.inf),
        },
        {"attn_mask": ADDED, "key_padding_mask": torch.zeros(2, 12).masked_fill(PADDING, -1.5)},
    ],
    ids=["padding", "float-padding", "bool", "float", "per-head", "bool-padding", "causal-padding", "float-both"],
)
@DYNAMIC
def test_masks_keep_their_meaning(masks, dynamic):
    layer, names = mha(), list(masks)

    def attend(x, *tensors):
        given = dict(zip((n for n in names if n != "is_causal"), tensors, strict=True))
        return layer(x, x, x, need_weights=False, is_causal="is_causal" in names, **given)[0]

    backend = same_as_dense(attend, X, *(m for m in masks.values() if m is not True), dynamic=dynamic)
    assert backend.sites[0].is_causal is False
    (call,) = backend.operators()
    assert "attn_mask" in call.kwargs


@DYNAMIC
@pytest.mark.parametrize("need_weights", [False, True], ids=["no-weights", "weights-unused"])
@pytest.mark.parametrize("spelling", ["hint", "float", "bool"])
def test_a_causal_mask_built_in_the_graph_is_recognised(spelling, need_weights, dynamic):
    layer = mha()

    def attend(x):
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        if spelling == "bool":
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        return layer(x, x, x, attn_mask=mask, is_causal=spelling == "hint", need_weights=need_weights)[0]

    backend = same_as_dense(attend, X, dynamic=dynamic)
    (call,) = backend.operators()
    assert backend.sites[0].is_causal and call.kwargs["is_causal"] and "attn_mask" not in call.kwargs


def test_a_causal_hint_that_is_not_true_means_what_it_means_without_rewriting():
    """With need_weights=True the dense call takes the mask at its word, otherwise the hint."""
    for need_weights in (True, False):
        backend = same_as_dense(attends(mha(), attn_mask=ADDED, is_causal=True, need_weights=need_weights), X)
        assert backend.sites[0].is_causal is not need_weights


@pytest.mark.parametrize("masks", ["padding", "bool", "float"])
def test_weights_that_nobody_uses_do_not_stand_in_the_way(masks):
    """need_weights=True is the default. Queries without key are NaN then, and stay NaN."""
    layer = mha()
    padding = PADDING.clone()
    padding[1] = True
    hidden = FUTURE.flip(0).clone()
    hidden[3] = True
    masks = {
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.zeros(12, 12).masked_fill(hidden, -torch.inf)},
    }[masks]
    out, _ = run(lambda x: layer(x, x, x, **masks)[0], X)
    backend = same_as_dense(lambda x: layer(x, x, x, **masks)[0], X)
    assert nodes_of(backend.graphs, operator.getitem) == [] and out.isnan().any() and not out.isnan().all()


def test_views_of_the_weights_that_nothing_reads_do_not_stand_in_the_way():
    layer = mha()

    def attend(x):
        out, weights = layer(x, x, x)
        weights[:, None].broadcast_to(2, 2, 12, 12).transpose(2, 3)
        return out

    same_as_dense(attend, X)


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per-head"])
def test_weights_that_are_used_keep_the_call_dense(average):
    layer = mha()
    backend = stays_as_compiled(lambda x: layer(x, x, x, average_attn_weights=average), X)
    assert "attention weights" in backend.reason
    backend = stays_as_compiled(lambda x: layer(x, x, x, average_attn_weights=average)[1].sum(), X)
    assert "attention weights" in backend.reason


def test_active_dropout_keeps_the_call_dense():
    layer = nn.MultiheadAttention(16, 2, dropout=0.25, batch_first=True).train()
    for dynamic in (False, True):
        torch._dynamo.reset()
        _, backend = run(attends(layer), X, dynamic=dynamic)
        assert "dropout is active (dropout_p=0.25)" in backend.reason
        assert backend.before == [lines(gm.graph) for gm in backend.graphs]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_needed_gradient_keeps_the_call_dense(training):
    layer = mha().train(training)
    out, backend = run(attends(layer), X, grad=True)
    assert "gradient" in backend.reason and backend.before == [lines(gm.graph) for gm in backend.graphs]
    out.square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    attends(layer)(X).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, layer.parameters(), strict=True))


def test_weights_without_gradients_are_no_reason_to_stay_dense():
    layer = mha().requires_grad_(False)
    torch._dynamo.reset()
    out, backend = run(attends(layer), X, grad=True)
    assert backend.rewritten == [True]
    torch.testing.assert_close(out, attends(layer)(X), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_rewritten(dtype):
    layer = mha().to(dtype)
    backend = same_as_dense(attends(layer), X.to(dtype), tolerance={"rtol": 2e-2, "atol": 1e-2})
    assert backend.sites[0].dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("inside", [False, True], ids=["around-the-compile", "in-the-graph"])
def test_autocast_is_the_calls(inside):
    layer = mha()

    def attend(x):
        if not inside:
            return attends(layer)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attends(layer)(x)
        return out + attends(layer)(x)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        backend = same_as_dense(attend, X, count=1 + inside, tolerance={"rtol": 2e-2, "atol": 1e-2})
    assert [site.dtype for site in backend.sites] == ["bfloat16", "float32"][: 1 + inside]


def test_two_calls_of_one_module_feed_each_other():
    layer = mha()
    backend = same_as_dense(lambda x: attends(layer)(attends(layer)(x) + x), X, count=2)
    assert [site.name for site in backend.sites] == ["MultiheadAttention:1", "MultiheadAttention:2"]


@DYNAMIC
def test_equal_calls_are_traced_once_and_keep_their_own_weights_and_meaning(dynamic, monkeypatch):
    traced, trace = [], dynamo.written_out
    monkeypatch.setattr(dynamo, "written_out", lambda *given: traced.append(1) or trace(*given))
    layers = [mha() for _ in range(3)]

    def attend(x):
        for layer in layers:
            x = x + attends(layer)(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = attends(layers[0], attn_mask=mask)(x)
        return attends(layers[1], attn_mask=x[0, :, :1] + mask)(x)

    backend = same_as_dense(attend, X, count=5, dynamic=dynamic)
    assert len(traced) == 2 * 3  # x itself has other strides than the sums; with a mask; all in two compiles
    assert [site.is_causal for site in backend.sites] == [False, False, False, True, False]


def test_copied_nodes_keep_the_calls_module_and_line():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = mha()

        def forward(self, x):
            return attends(self.attn)(x)

    backend = same_as_dense(Model().eval(), X)
    assert backend.sites[0].name == "attn"
    (projection, *_) = nodes_of(backend.graphs, torch.ops.aten.linear.default)
    for node in (projection, *backend.operators()):
        assert list(node.meta["nn_module_stack"].values())[-1][1] is nn.MultiheadAttention
        assert f"{__file__}" in node.meta["stack_trace"]


def test_a_policy_may_keep_it_dense():
    _, backend = run(attends(mha()), X, policy=Policy(min_tokens=0, dense=("MultiheadAttention",)))
    assert "dense pattern" in backend.reason and backend.before == [lines(gm.graph) for gm in backend.graphs]


def test_an_input_written_in_place_later_is_read_before():
    layer = mha()

    def attend(x):
        x = x.clone()
        out = attends(layer)(x)
        return out + x.mul_(2)

    same_as_dense(attend, X)


def test_an_input_that_changes_its_shape_in_place_is_refused():
    layer = mha(batch_first=False)

    def attend(x):
        x = x.clone()
        out = attends(layer)(x)
        return out.sum() + x.transpose_(0, 1).sum()

    assert "in place" in stays_as_compiled(attend, X).reason


def test_a_mask_written_in_place_is_data():
    layer = mha()

    def attend(x):
        mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
        mask[0, 1] = False
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    assert same_as_dense(attend, X).sites[0].is_causal is False


def test_what_cannot_be_traced_is_refused():
    """Nested tensors and tensor subclasses do not reach these calls in a graph today."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    call = graph.call_function(
        F.multi_head_attention_forward, (x, x, x, 16, 2, weight, *[None] * 3, False, 0.0, weight, None)
    )
    dynamo.set_example(x, X)
    dynamo.set_example(call, (X, None))
    (site,) = find_sites(fx.GraphModule(nn.Module(), graph))
    assert "x is not a plain strided tensor" in site.unmatched
