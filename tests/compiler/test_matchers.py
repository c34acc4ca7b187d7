"""Every spelling of attention is found, named and bound; what is not attention is not reported."""

import functools

import pytest
import torch
import torch.nn.functional
import torch.nn.functional as F
from light import CLOSE, Attention, LightBackend, Stack, lines, nodes_of, qkv, run
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import sparge_compile as sparge
from sparge_compile import Policy, dynamo
from sparge_compile.matchers.sdpa import TARGETS

ATEN = torch.ops.aten.scaled_dot_product_attention
SPELLINGS = {
    "F": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "torch.nn.functional": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    "imported-name": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "builtin": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True),
    "aten": lambda q, k, v: ATEN(q, k, v, is_causal=True),
    "aten.default": lambda q, k, v: ATEN.default(q, k, v, is_causal=True),
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(
        is_causal=True, value=v, key=k, query=q, dropout_p=0.0, attn_mask=None, scale=None, enable_gqa=False
    ),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, is_causal=True),
    "swapped-keywords": lambda q, k, v: F.scaled_dot_product_attention(q, value=v, key=k, is_causal=True),
    "aten-positional": lambda q, k, v: ATEN(q, k, v, None, 0.0, True, scale=None),
    "partial": lambda q, k, v: functools.partial(F.scaled_dot_product_attention, is_causal=True)(q, k, v),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_becomes_one_operator_with_the_arguments_in_place(spelling):
    q, k, v = qkv(tokens=9, keys=7)
    out, backend = run(spelling, q, k, v)
    assert sum("scaled_dot_product_attention](" in line.replace(".default", "") for line in backend.before[0]) == 1
    assert [len(nodes_of(backend.graphs, target)) for target in TARGETS] == [0, 0, 0]
    (node,) = backend.operators()
    assert node.kwargs["is_causal"] is True and node.kwargs["scale"] is None
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), **CLOSE)


def test_calls_with_all_arguments_keep_each_of_them():
    q, k, v = qkv(heads=4, kv_heads=2)
    out, backend = run(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.7, enable_gqa=True), q, k, v
    )
    (node,) = backend.operators()
    assert (node.kwargs["scale"], node.kwargs["enable_gqa"], node.kwargs["is_causal"]) == (0.7, True, False)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.7, enable_gqa=True), **CLOSE)


def test_each_call_is_rewritten_once_and_nothing_else_changes():
    _, backend = run(Stack(3).eval(), torch.randn(2, 6, 16))
    after = lines(backend.graphs[0].graph)
    assert len(backend.operators()) == 3 and len(after) == len(backend.before[0])
    changed = [b for a, b in zip(backend.before[0], after, strict=True) if a.split("(")[0] != b.split("(")[0]]
    assert len(changed) == 3 and all("torch.ops.sparge.attention.default" in line for line in changed)


@pytest.mark.parametrize("how", ["context", "option"])
def test_with_rewriting_off_inductor_gets_the_graph_it_always_gets(how, monkeypatch):
    model, x = Stack(2).eval(), torch.randn(2, 6, 16)
    graphs = []

    def keep(gm, *_):
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(dynamo, "compile_with_inductor", keep)
    options = {"sparge.enabled": False} if how == "option" else {"sparge.min_tokens": 0}
    with torch.no_grad():
        with sparge.rewriting(**({} if how == "option" else {"enabled": False})):
            torch.compile(model, backend="sparge", options=options)(x)
        torch._dynamo.reset()
        torch.compile(model, backend=keep)(x)
    ours, theirs = (
        [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes] for gm in graphs
    )
    assert ours == theirs and len(ours) > 10
    assert not sparge.last_report().rewritten


class TwoCalls(nn.Module):
    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x) + 1
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) + 1


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Sequential(TwoCalls(), TwoCalls())})

    def forward(self, x):
        return self.inner["a"](x)


def a_function(x):
    return F.scaled_dot_product_attention(x, x, x)


def two_in_a_function(x):
    return a_function(F.scaled_dot_product_attention(x, x, x))


NAMES = {
    "module-list": (lambda: Stack(2), (1, 4, 16), ["blocks.0", "blocks.1"]),
    "sequential": (lambda: nn.Sequential(Attention(), nn.Sequential(Attention())), (1, 4, 16), ["0", "1.0"]),
    "two-calls": (Nested, (1, 2, 4, 8), ["inner.a.0:1", "inner.a.0:2", "inner.a.1:1", "inner.a.1:2"]),
    "root": (Attention, (1, 4, 16), ["Attention"]),
    "function": (lambda: a_function, (1, 2, 4, 8), ["a_function"]),
    "helper-function": (lambda: lambda x: a_function(x) + 1, (1, 2, 4, 8), ["a_function"]),
}


@pytest.mark.parametrize(("make", "shape", "names"), NAMES.values(), ids=NAMES.keys())
def test_sites_are_named_by_module_or_function(make, shape, names):
    _, backend = run(make(), torch.randn(shape))
    assert sorted(site.name for site in backend.sites) == names


def test_one_module_called_twice_gives_two_names():
    shared = Attention()
    _, backend = run(nn.Sequential(shared, shared), torch.randn(1, 4, 16))
    assert len({site.name for site in backend.sites}) == 2


def test_a_module_called_from_a_compiled_function_keeps_its_name():
    model = Stack(1)
    _, backend = run(lambda x: model(x) + 1, torch.randn(1, 4, 16))
    assert backend.sites[0].name.endswith("blocks.0") and "[" not in backend.sites[0].name
    assert "cell_contents" not in backend.sites[0].name


class Broken(nn.Module):
    """A graph break between two blocks, in the frame of the whole model."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


class BreaksInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.attention(x)


def test_names_stay_whole_after_a_graph_break_in_the_model():
    _, backend = run(Broken(), torch.randn(1, 4, 16))
    assert backend.compiles == 2 and [site.name for site in backend.sites] == ["blocks.0", "blocks.1"]


def test_a_dense_pattern_holds_after_a_graph_break_inside_a_block():
    model = nn.Sequential(BreaksInside(), nn.Identity())
    _, backend = run(model, torch.randn(1, 4, 16), policy=Policy(min_tokens=0, dense=("0.*",)))
    assert [(site.name, site.rewritten) for site in backend.sites] == [("0.attention", False)]


def test_attention_may_feed_attention_directly():
    x = torch.randn(1, 2, 6, 8)
    out, backend = run(two_in_a_function, x)
    assert backend.rewritten == [True, True]
    torch.testing.assert_close(out, two_in_a_function(x), **CLOSE)


def test_a_block_compiled_on_its_own_is_named_within_itself():
    model, backend = Stack(2).eval(), LightBackend()
    for block in model.blocks:
        block.compile(backend=backend)
    with torch.no_grad():
        model(torch.randn(1, 4, 16))
    assert backend.compiles == 1 and [site.name for site in backend.sites] == ["Attention"]


def test_the_source_is_the_line_of_the_call():
    _, backend = run(a_function, torch.randn(1, 2, 4, 8))
    first = a_function.__code__.co_firstlineno
    assert backend.sites[0].source == f"{__file__}:{first + 1}"


def router(x, weight, experts):
    return torch.einsum("be,bed->bd", torch.softmax(F.linear(x, weight), -1), experts)


NOT_ATTENTION = {
    "moe-linear": router,
    "moe-matmul": lambda x, w, e: torch.einsum("be,bed->bd", torch.softmax(x @ w.T, -1), e),
    "classifier": lambda x, w, e: torch.softmax(x @ w.T, -1),
    "log-likelihood": lambda x, w, e: torch.softmax(x @ w.T, -1).log().sum(),
    "gate": lambda x, w, e: torch.softmax(x, -1) * x @ w.T,
}


@pytest.mark.parametrize("function", NOT_ATTENTION.values(), ids=NOT_ATTENTION.keys())
def test_a_softmax_that_is_not_attention_is_not_reported(function):
    _, backend = run(function, torch.randn(3, 8), nn.Parameter(torch.randn(4, 8)), torch.randn(3, 4, 8))
    assert backend.sites == []


def test_another_librarys_kernel_is_reported_and_left_alone():
    q, k, v = qkv()
    out, backend = run(lambda *x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*x)[0], q, k, v)
    assert [(site.pattern, site.rewritten) for site in backend.sites] == [("opaque", False)]
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
