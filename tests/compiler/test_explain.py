"""`explain` and `last_report` list every attention call once, with what the compile does to it, and change nothing."""

import cProfile
import gc
import json
import sys
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from light import EXACT, EXACT_FIELDS, EXACT_OPTIONS, Attention, LightBackend, Stack, run
from torch import nn

import sparge_compile as sparge
from sparge_compile import Policy, StrictPolicyError, dynamo
from sparge_compile.rules import break_even

X = torch.randn(1, 6, 16)


def one_line(report):
    return [(site.name, site.rewritten) for site in report.sites]


def test_the_table_and_the_json_say_the_same():
    report = sparge.explain(Stack(2).eval(), X, policy=Policy(**{**EXACT_FIELDS, "dense": ("*.1",)}))
    first, second = report.sites
    assert one_line(report) == [("blocks.0", True), ("blocks.1", False)]
    assert report.rewritten == (first,) and report.dense == (second,)
    assert (first.q_len, first.k_len, first.heads, first.head_dim, first.dtype) == (6, 6, 2, 8, "float32")
    assert first.reason is None and first.density == 1.0 and first.thresholds[0]["cdf"] == 1.0
    assert second.requested and "dense pattern '*.1'" in second.reason and second.density is None
    table = str(report)
    assert table.startswith("1 of 2 attention calls rewritten")
    assert all(word in table for word in ("blocks.0", "blocks.1", "6 x 6", "2 x 8", "fp32", second.reason))
    content = json.loads(report.to_json())
    assert [site["name"] for site in content["sites"]] == ["blocks.0", "blocks.1"]
    assert content["sites"][1]["reason"] == second.reason and content["sites"][0]["density"] == 1.0


class Disabled(nn.Module):
    @torch._dynamo.disable
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Print(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.break_, self.eager, self.last = Attention(), Print(), Disabled(), Attention()

    def forward(self, x):
        return self.last(self.eager(self.break_(self.first(x))[:, None])[:, 0])


def test_calls_outside_graphs_are_listed_with_that_reason():
    report = sparge.explain(Mixed().eval(), X, policy=EXACT)
    assert sorted(one_line(report)) == [("eager", False), ("first", True), ("last", True)]
    (eager,) = report.dense
    assert "outside every compiled graph" in eager.reason
    line = Disabled.forward._torchdynamo_orig_callable.__code__.co_firstlineno + 2
    assert eager.source == f"{__file__}:{line}"


def test_multi_head_attention_in_a_graph_is_listed_once():
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    report = sparge.explain(nn.Sequential(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)), X)
    assert [site.pattern for site in report.sites] == ["mha"]
    report = sparge.explain(lambda x: layer(x, x, x, need_weights=False)[0], X)
    assert [site.pattern for site in report.sites] == ["mha"]


def bounded(length):
    x = torch.randn(1, 2, length, 8)
    torch._dynamo.mark_dynamic(x, 2, min=8, max=100)
    return x


def test_a_call_that_the_operator_runs_dense_is_listed_once_and_as_dense():
    def function(x):
        return F.scaled_dot_product_attention(x, x, x)

    policy = Policy(min_tokens=64, topk=1.0)
    (site,) = sparge.explain(function, bounded(40), policy=policy).sites
    assert not site.rewritten and "fewer queries or keys than min_tokens" in site.reason
    assert site.thresholds == () and site.threshold_source is None and site.density is None
    (site,) = sparge.explain(function, bounded(70), policy=policy).sites
    assert site.rewritten and site.density == 1.0


class Twice(nn.Module):
    """One block that runs for each of the inputs, with graph breaks between."""

    def __init__(self):
        super().__init__()
        self.block = Attention()

    def forward(self, *inputs):
        total = 0
        for x in inputs:
            total = total + self.block(x).sum()
            torch._dynamo.graph_break()
        return total


@pytest.mark.parametrize("lengths", [(40, 6), (6, 40)], ids=["long-first", "short-first"])
def test_a_site_that_ran_both_ways_is_listed_twice(lengths):
    inputs = [torch.randn(1, length, 16) for length in lengths]
    report = sparge.explain(Twice().eval(), *inputs, policy=Policy(min_tokens=20, topk=1.0))
    (sparse,), (dense,) = report.rewritten, report.dense
    assert sparse.name == dense.name and sparse.source == dense.source
    assert sparse.density == 1.0 and "min_tokens" in dense.reason


def test_a_site_that_the_operator_ran_both_ways_is_listed_twice():
    inputs = [torch.randn(1, length, 16) for length in (70, 40)]
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 1, min=8, max=100)
    report = sparge.explain(Twice().eval(), *inputs, policy=Policy(min_tokens=64, topk=1.0))
    (sparse,), (dense,) = report.rewritten, report.dense
    assert (sparse.name, sparse.source, sparse.density) == (dense.name, dense.source, 1.0)
    assert "the operator ran it dense" in dense.reason


def test_the_table_says_which_mask_a_call_has():
    def function(q, mask):
        q = F.scaled_dot_product_attention(q, q, q)
        q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        q = F.scaled_dot_product_attention(q, q, q, torch.arange(6) <= torch.arange(6)[:, None])
        return F.scaled_dot_product_attention(q, q, q, mask)

    report = sparge.explain(function, torch.randn(1, 2, 6, 8), torch.rand(6, 6) > 0.5, policy=EXACT)
    assert [(site.is_causal, site.masked) for site in report.sites] == [
        (False, False),
        (True, False),
        (True, False),
        (False, True),
    ]
    rows = [line.split() for line in str(report).splitlines() if line.startswith("function")]
    assert [("causal" in row[-4:], "given" in row) for row in rows] == [(False, False), (True, False), (False, True)]


def test_short_calls_say_why():
    report = sparge.explain(Attention().eval(), X)
    assert f"6 queries and 6 keys, min_tokens is {break_even(X.device, 'auto')}" in report.dense[0].reason


def break_inside(x):
    torch._dynamo.graph_break()
    return x


class BreakingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(break_inside(x))


def test_each_of_several_equal_blocks_with_a_graph_break_is_listed():
    model = nn.Sequential(BreakingBlock(), BreakingBlock(), BreakingBlock()).eval()
    names = [site.name for site in sparge.explain(model, X, policy=EXACT).sites]
    assert sorted(names) == ["0.attention", "1.attention", "2.attention"]


def test_a_module_called_with_two_shapes_is_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = BreakingBlock()

        def forward(self, x):
            return self.inner(x).sum() + self.inner(x[:, :4]).sum()

    names = [site.name for site in sparge.explain(Twice().eval(), X, policy=EXACT).sites]
    assert names == ["inner.attention"]


def test_the_compile_and_explain_agree_after_a_graph_break():
    model = nn.Sequential(BreakingBlock()).eval()
    policy = Policy(**{**EXACT_FIELDS, "dense": ("0.*",)})
    explained = one_line(sparge.explain(model, X, policy=policy))
    torch._dynamo.reset()
    _, backend = run(model, X, policy=policy)
    assert [(site.name, site.rewritten) for site in backend.sites] == explained


FORMS = {
    "module": lambda model, **how: torch.compile(model, **how),
    "function": lambda model, **how: torch.compile(lambda x: model(x), **how),
    "in-place": lambda model, **how: model.compile(**how) or model,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_compiled_model_is_explained_with_its_own_options(form):
    compiled = form(Attention().eval(), backend="sparge", options={**EXACT_OPTIONS, "sparge.cdf_threshold": 0.5})
    (site,) = sparge.explain(compiled, X).sites
    assert site.rewritten and site.thresholds[0]["cdf"] == 0.5
    (site,) = sparge.explain(compiled, X, policy=Policy(min_tokens=77)).sites
    assert "min_tokens is 77" in site.reason


def test_the_policy_in_force_is_explained():
    with sparge.rewriting(**EXACT_FIELDS):
        assert sparge.explain(Attention().eval(), X).rewritten
        assert sparge.explain(Attention().eval(), X, policy=Policy()).dense


def test_explaining_many_times_gives_the_same_and_leaves_room_to_compile():
    model = Stack(1).eval()
    reports = [sparge.explain(model, X, policy=EXACT) for _ in range(20)]
    assert {tuple(one_line(report)) for report in reports} == {(("blocks.0", True),)}
    _, backend = run(model, X)
    assert backend.rewritten == [True]


def test_explain_has_no_lasting_effect():
    model = Stack(1).train()
    model.compile(backend="eager")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def hook(frame, event, argument):
        return None

    limits = (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    impl, filters = model._compiled_call_impl, list(warnings.filters)
    sys.setprofile(hook)
    try:
        sparge.explain(model, X)
        with pytest.raises(TypeError):
            sparge.explain(model)
        assert sys.getprofile() is hook
    finally:
        sys.setprofile(None)
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == limits
    assert model._compiled_call_impl is impl and model.training and torch.is_grad_enabled()
    assert list(warnings.filters) == filters
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_explain_keeps_no_model_alive():
    model = Stack(2).eval()
    sparge.explain(model, X, policy=EXACT)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_running_profiler_survives_explain():
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        sparge.explain(Attention().eval(), X)
        sum(sorted([3, 1, 2]))
    finally:
        profiler.disable()
    assert any("explaining.py" in str(entry.code) for entry in profiler.getstats())


def test_strict_raises_its_own_error():
    with pytest.raises(StrictPolicyError, match="min_tokens is 999"):
        sparge.explain(Attention().eval(), X, policy=Policy(strict=True, min_tokens=999))


def eager_inductor(monkeypatch):
    monkeypatch.setattr("sparge_compile.dynamo.compile_with_inductor", lambda gm, *_: gm.forward)


def test_the_last_report_covers_every_graph_of_the_last_compile(monkeypatch):
    eager_inductor(monkeypatch)
    model = Mixed().eval()
    with torch.no_grad():
        torch.compile(Stack(1).eval(), backend="sparge", options=EXACT_OPTIONS)(X)
        torch.compile(model, backend="sparge", options=EXACT_OPTIONS)(X)
    assert sorted(one_line(sparge.last_report())) == [("first", True), ("last", True)]


def test_the_last_report_keeps_apart_sites_that_one_line_of_code_serves(monkeypatch):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = Attention(), Attention(is_causal=True), Attention(scale=0.1)

        def forward(self, x):
            return self.three(break_inside(self.two(break_inside(self.one(break_inside(x))))))

    eager_inductor(monkeypatch)
    with torch.no_grad():
        torch.compile(Three().eval(), backend="sparge", options=EXACT_OPTIONS)(X)
    assert sorted(site.name for site in sparge.last_report().sites) == ["one", "three", "two"]


def test_the_last_report_follows_the_policy_and_keeps_one_line_per_site(monkeypatch):
    eager_inductor(monkeypatch)
    compiled = torch.compile(Stack(2).eval(), backend="sparge", options=EXACT_OPTIONS)
    with torch.no_grad():
        compiled(X)
        assert [site.rewritten for site in sparge.last_report().sites] == [True, True]
        with sparge.rewriting(enabled=False):
            compiled(X)
        compiled(torch.randn(1, 9, 16))
    assert len(sparge.last_report().sites) == 2


def test_the_last_report_of_a_model_without_attention_is_empty(monkeypatch):
    eager_inductor(monkeypatch)
    with torch.no_grad():
        torch.compile(Stack(1).eval(), backend="sparge", options=EXACT_OPTIONS)(X)
        torch.compile(nn.Linear(16, 2), backend="sparge")(X)
    assert sparge.last_report().sites == ()


def test_explain_does_not_replace_the_last_report(monkeypatch):
    eager_inductor(monkeypatch)
    with torch.no_grad():
        torch.compile(Stack(1).eval(), backend="sparge", options=EXACT_OPTIONS)(X)
    before = sparge.last_report()
    sparge.explain(Attention().eval(), X)
    assert sparge.last_report() == before


@pytest.mark.skipif(not dynamo.ISOLATES, reason="torch 2.11 cannot keep compiles apart; explain's docstring says so")
def test_explaining_many_policies_leaves_room_to_compile():
    model = Attention().eval()
    for step in range(1, 11):
        sparge.explain(model, X, policy=Policy(min_tokens=0, topk=step / 10))
    backend = LightBackend()
    with torch.no_grad():
        torch.compile(model, backend=backend)(X)
    assert backend.rewritten == [True]


def test_the_models_own_warnings_are_heard_and_ours_are_in_the_report():
    class Warns(torch.nn.Module):
        def forward(self, x):
            warnings.warn("of the model", stacklevel=1)
            return F.scaled_dot_product_attention(x, x, x)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = sparge.explain(Warns(), torch.randn(1, 2, 6, 8))
    assert len(report.dense) == 1
    texts = [str(warning.message) for warning in heard]
    assert "of the model" in texts and not any(text.startswith("sparge") for text in texts)
