"""What Inductor's own attention pass would make wrong is right under our name, and Inductor's own without us."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from light import CLOSE, EXACT_FIELDS, EXACT_OPTIONS, qkv
from torch import Tensor

import sparge_compile as sparge
from sparge_compile import dynamo
from sparge_compile.inductor import misread_by_attention_pass

INPUTS = qkv(heads=4, tokens=16)


def between_products(softmax):
    def function(q, k, v):
        return softmax(q @ k.transpose(-2, -1) * 0.3) @ v

    return function


def written_out(scores, dim, before=lambda e: e, after=lambda total: total):
    terms = (scores - scores.amax(dim, keepdim=True)).exp()
    return terms / after(before(terms).sum(dim, keepdim=True))


SOFTMAXES = {
    "queries": lambda s: s.softmax(-2),
    "heads": lambda s: torch.softmax(s, 1),
    "batch": lambda s: F.softmax(s, dim=0),
    "module": torch.nn.Softmax(-2),
    "special": lambda s: torch.special.softmax(s, -2),
    "aten": lambda s: torch.ops.aten.softmax.int(s, 2),
    "aten-inner": lambda s: torch.ops.aten._softmax.default(s, -2, False),
    "written-out": lambda s: written_out(s, -2),
    "written-out-over-heads": lambda s: written_out(s, (1,)),
    "sum-of-a-clone": lambda s: written_out(s, -2, before=torch.clone),
    "sum-of-a-conversion": lambda s: written_out(s, -2, before=Tensor.float),
    "sum-of-a-view": lambda s: written_out(s, -2, before=lambda e: e.view_as(s)),
    "contiguous-sum": lambda s: written_out(s, -2, after=Tensor.contiguous),
}
OVER_KEYS = {
    "method": lambda s: s.softmax(-1),
    "aten": lambda s: torch.ops.aten.softmax.int(s, 3),
    "written-out": lambda s: written_out(s, -1),
    "a-sum-of-something-else": lambda s: s.exp() / s.sum(1, keepdim=True).exp(),
    "frequencies": lambda s: s.softmax(-1) * torch.arange(4).float().exp().sum(0),
}


@pytest.fixture(autouse=True)
def no_gradients_and_no_warnings():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def graph_of(function):
    graphs = []
    torch.compile(function, backend=lambda gm, _: graphs.append(gm) or gm.forward)(*INPUTS)
    return graphs[0]


@pytest.mark.parametrize("name", SOFTMAXES)
def test_every_spelling_of_a_softmax_over_other_dimensions_is_seen(name):
    assert misread_by_attention_pass(graph_of(between_products(SOFTMAXES[name])))


@pytest.mark.parametrize("name", OVER_KEYS)
def test_attention_keeps_every_pass_of_inductor(name):
    assert not misread_by_attention_pass(graph_of(between_products(OVER_KEYS[name])))


def test_without_two_products_there_is_nothing_to_misread():
    assert not misread_by_attention_pass(graph_of(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(1)))


def test_a_product_of_linear_algebra_is_a_product():
    def function(q, k, v):
        return torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-2), v)

    assert misread_by_attention_pass(graph_of(function))


@pytest.mark.parametrize("name", ["queries", "heads", "special", "written-out", "sum-of-a-clone"])
def test_the_result_through_inductor_is_that_of_eager(name):
    function = between_products(SOFTMAXES[name])
    compiled = torch.compile(function, backend="sparge")
    torch.testing.assert_close(compiled(*INPUTS), function(*INPUTS), **CLOSE)


def both(q, k, v):
    """A call to be rewritten beside what is not attention."""
    return between_products(SOFTMAXES["queries"])(F.scaled_dot_product_attention(q, k, v), k, v)


def test_attention_in_the_same_graph_is_still_rewritten():
    compiled = torch.compile(both, backend="sparge", options=EXACT_OPTIONS)
    torch.testing.assert_close(compiled(*INPUTS), both(*INPUTS), **CLOSE)
    assert len(sparge.last_report().rewritten) == 1


@pytest.mark.parametrize("name", ["queries", "special"])
def test_with_rewriting_off_the_result_is_plain_inductors_right_or_wrong(name):
    """In either order: what was compiled with rewriting on never serves the call without."""
    function = between_products(SOFTMAXES[name])
    plain = torch.compile(function, backend="inductor")(*INPUTS)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="sparge")
    for enabled in (True, False, True):
        with sparge.rewriting(enabled=enabled, **EXACT_FIELDS):
            out = compiled(*INPUTS)
        if enabled:
            torch.testing.assert_close(out, function(*INPUTS), **CLOSE)
        else:
            assert torch.equal(out, plain)


def test_only_graphs_that_need_it_are_kept_from_inductors_patterns(monkeypatch):
    given = []
    monkeypatch.setattr(
        dynamo, "compile_with_inductor", lambda gm, _, mode, options: given.append(options) or gm.forward
    )
    for function in (between_products(SOFTMAXES["heads"]), between_products(OVER_KEYS["method"]), both):
        torch.compile(function, backend="sparge", options={"max_autotune": False})(*INPUTS)
    off = {"pattern_matcher": False, "max_autotune": False}
    assert given == [off, {"max_autotune": False}, off]
