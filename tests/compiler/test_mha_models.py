"""PyTorch's own transformers, whole: names, reports, calibration, attached thresholds, Inductor."""

from __future__ import annotations

import pytest
import torch
from calibrated import QUIET
from light import CLOSE, EXACT, EXACT_OPTIONS, LightBackend, nodes_of, run
from opaque_calls import same_as_dense
from torch import nn

import sparge_compile as sparge
from sparge_compile import Profile, observe
from sparge_kernels.thresholds import Thresholds

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(12)
FAST, SLOW = "layers.{}", "layers.{}.self_attn"


def encoder(fast=True, depth=2):
    """Two layers; an odd number of heads keeps PyTorch from its fast path."""
    heads = 2 if fast else 1
    layer = nn.TransformerEncoderLayer(16, heads, 24, dropout=0.3, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=fast).eval().requires_grad_(False)


def decoder():
    layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerDecoder(layer, 2).eval().requires_grad_(False)


@pytest.mark.parametrize("fast", [True, False], ids=["fast-path", "slow-path"])
def test_an_encoder_is_rewritten_layer_by_layer(fast):
    backend = same_as_dense(encoder(fast), X, count=2)
    expected = FAST if fast else SLOW
    assert [site.name for site in backend.sites] == [expected.format(number) for number in (0, 1)]


@pytest.mark.parametrize("fast", [True, False], ids=["fast-path", "slow-path"])
def test_padding_of_an_encoder_keeps_its_meaning(fast):
    model, padding = encoder(fast), torch.arange(12) >= torch.tensor([[9], [12]])
    backend = same_as_dense(lambda x, p: model(x, src_key_padding_mask=p), X, padding, count=2)
    assert all("attn_mask" in call.kwargs for call in backend.operators())


@pytest.mark.parametrize("fast", [True, False], ids=["fast-path", "slow-path"])
def test_a_causal_encoder_runs_causally(fast):
    model = encoder(fast)

    def forward(x):
        return model(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)

    backend = same_as_dense(forward, X, count=2)
    assert all(site.is_causal for site in backend.sites)
    out, later = (run(forward, x)[0] for x in (X, torch.cat([X[:, :7], X[:, 7:] + 1], 1)))
    assert torch.equal(out[:, :7], later[:, :7])


def test_a_decoder_is_rewritten_in_self_and_cross_attention():
    model, memory = decoder(), torch.randn(2, 20, 16)
    backend = same_as_dense(lambda x, m: model(x, m, tgt_mask=CAUSAL, tgt_is_causal=True), X, memory, count=4)
    calls = [(site.name, site.is_causal, site.k_len) for site in backend.sites]
    assert calls == [
        ("layers.0.self_attn", True, 12),
        ("layers.0.multihead_attn", False, 20),
        ("layers.1.self_attn", True, 12),
        ("layers.1.multihead_attn", False, 20),
    ]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_whole_transformer_is_rewritten(dynamic):
    model = nn.Transformer(16, 2, 1, 1, 24).eval()
    x = torch.randn(12, 2, 16)

    def forward(source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[0])
        return model(source, target, tgt_mask=mask, tgt_is_causal=True)

    backend = same_as_dense(forward, x, x[:9], count=3, dynamic=dynamic)
    assert [site.is_causal for site in backend.sites] == [False, True, False]


@pytest.mark.parametrize("fast", [True, False], ids=["fast-path", "slow-path"])
def test_a_calibrated_profile_names_the_modules_and_reaches_the_operator(fast):
    model = encoder(fast)
    x = torch.randn(1, 384, 16).cumsum(1) / 20
    with torch.no_grad():
        expected = model(x)
    profile = sparge.calibrate(model, [x], max_error=0.2, **QUIET)
    names = [(FAST if fast else SLOW).format(number) for number in (0, 1)]
    assert sorted(profile.sites) == names and len(profile.sites[names[0]]) == (2 if fast else 1)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    backend = LightBackend(sparge.Policy(min_tokens=0, profile=profile))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert [site.threshold_source for site in backend.sites] == ["profile", "profile"]


def test_calibration_sees_the_call_inside_the_opaque_one():
    """What an observer sees is the attention's own output, before the output projection."""
    model, seen = encoder(depth=1), []

    class Looks(observe.Observer):
        def saw(self, site, call):
            seen.append((site, call))

    padding = torch.arange(12) >= torch.tensor([[9], [12]])
    with torch.no_grad(), sparge.rewriting(EXACT):
        compiled = torch.compile(model, backend=observe.observing_backend)
        Looks(model).run(compiled, {"src": X, "src_key_padding_mask": padding})
    ((site, call),) = seen
    assert site == "layers.0" and call.query.shape == call.dense.shape == (2, 2, 12, 8)
    attended = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, call.attn_mask)
    torch.testing.assert_close(call.dense, attended, **CLOSE)


@pytest.mark.parametrize("fast", [True, False], ids=["fast-path", "slow-path"])
def test_attached_thresholds_reach_the_operator(fast):
    model, path = encoder(fast), FAST if fast else SLOW
    heads = 2 if fast else 1
    own = Profile(
        {path.format(n): tuple(Thresholds(0.2 + 0.3 * n, 1.0, -1.0, None) for _ in range(heads)) for n in (0, 1)}
    )
    x = torch.randn(1, 500, 16).cumsum(1) / 20
    policy = sparge.Policy(min_tokens=0, precision="none")
    whole, _ = run(model, x, policy=sparge.policy.replace(policy, {"profile": own}))
    torch._dynamo.reset()
    dense, _ = run(model, x)
    torch._dynamo.reset()
    with sparge.attach(model, own):
        attached, backend = run(model, x, policy=policy)
    assert [site.threshold_source for site in backend.sites] == ["attached profile"] * 2
    assert all("threshold_table" in call.kwargs for call in backend.operators())
    torch.testing.assert_close(attached, whole)
    assert not torch.allclose(attached, dense)


def test_thresholds_attached_where_the_fast_path_passes_by_are_not_ignored_in_silence():
    model, own = encoder(), Profile({SLOW.format(0): (Thresholds(0.2, 1.0, -1.0, None),)})
    with sparge.attach(model, own):
        _, backend = run(model, X)
        assert backend.rewritten == [False, True] and "fast path" in backend.sites[0].reason
        _, backend = run(model.layers[0], X)
        assert backend.rewritten == [False] and "fast path" in backend.reason
    _, backend = run(model, X)
    assert backend.rewritten == [True, True]


@pytest.mark.parametrize("made_fast", [True, False], ids=["named-on-the-fast-path", "named-on-the-slow-path"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast-path", "slow-path"])
def test_a_layer_is_known_by_the_name_of_either_path(fast, made_fast):
    """Which path torch takes depends on the input and on hooks; a policy and a profile must not."""
    model, name = encoder(fast), (FAST if made_fast else SLOW)
    kept = sparge.Policy(min_tokens=0, dense=(name.format(0),))
    _, backend = run(model, X, policy=kept)
    assert backend.rewritten == [False, True] and "dense pattern" in backend.sites[0].reason
    torch._dynamo.reset()
    own = Profile({name.format(1): (Thresholds(0.2, 1.0, -1.0, None),)})
    _, backend = run(model, X, policy=sparge.Policy(min_tokens=0, profile=own))
    assert [site.threshold_source for site in backend.sites] == ["rule full", "profile"]


def test_thresholds_attached_by_the_name_of_the_fast_path_are_used_on_the_slow_one():
    model, own = encoder(fast=False), Profile({FAST.format(0): (Thresholds(0.2, 1.0, -1.0, None),)})
    with sparge.attach(model, own):
        _, backend = run(model, X)
    assert [site.threshold_source for site in backend.sites] == ["attached profile", "policy"]
    assert [site.name for site in backend.sites] == [SLOW.format(0), SLOW.format(1)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_compiles_what_is_written_out(dynamic):
    model = decoder() if dynamic else encoder()
    inputs = (torch.randn(2, 33, 16), torch.randn(2, 20, 16))[: 1 + dynamic]
    with torch.no_grad():
        expected = model(*inputs)
        out = torch.compile(model, backend="sparge", options=EXACT_OPTIONS, dynamic=dynamic)(*inputs)
    assert len(sparge.last_report().rewritten) == 2 * len(inputs) and not sparge.last_report().dense
    torch.testing.assert_close(out, expected, **CLOSE)


def test_inductor_keeps_the_nan_of_queries_without_a_key():
    model, padding = encoder(depth=1), torch.arange(33) >= torch.tensor([[20], [0]])
    x = torch.randn(2, 33, 16)
    with torch.no_grad():
        expected = model.layers[0](x, src_key_padding_mask=padding)
        compiled = torch.compile(model.layers[0], backend="sparge", options=EXACT_OPTIONS)
        out = compiled(x, src_key_padding_mask=padding)
    assert len(sparge.last_report().rewritten) == 1 and expected[1].isnan().all()
    torch.testing.assert_close(out, expected, equal_nan=True, **CLOSE)


def test_explain_measures_the_density_inside_an_opaque_call():
    report = sparge.explain(encoder(), torch.randn(1, 384, 16).cumsum(1), policy=sparge.Policy(min_tokens=0, topk=0.5))
    assert [(site.name, site.pattern, site.rewritten) for site in report.sites] == [
        ("layers.0", "mha", True),
        ("layers.1", "mha", True),
    ]
    assert all(0 < site.density < 1 for site in report.sites)


def test_rewriting_off_leaves_the_opaque_calls():
    backend = LightBackend(sparge.Policy(enabled=False))
    model = encoder()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(X), model(X))
    assert len(nodes_of(backend.graphs, torch._transformer_encoder_layer_fwd)) == 2
