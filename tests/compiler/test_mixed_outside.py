"""`explain` on models with graph breaks: attention that ran outside every compiled graph is listed, of every kind."""

import functools
import gc
import sys
import threading
import weakref

import pytest
import torch
from diffusers import MochiTransformer3DModel
from light import EXACT, Attention
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparge_compile as sparge
from sparge_compile import dynamo

X = torch.randn(1, 6, 16)
OUTSIDE = "outside every compiled graph"


def test_mochi_breaks_its_graph_in_a_loop_and_every_call_is_listed():
    """Its attention walks the batch and asks each prompt's mask for nonzero: a graph break that skips the frame."""
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 16, 16),
        "timestep": torch.tensor([1.0, 1.0]),
        "encoder_attention_mask": torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]]),
    }
    report = sparge.explain(model, **inputs, policy=EXACT)
    outside = {site.name: site for site in report.dense}
    assert list(outside) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert all("attention_processor.py:" in site.source for site in outside.values())
    assert all(OUTSIDE in site.reason for site in outside.values())
    assert [site.name for site in report.rewritten] == ["time_embed.pooler"]


class Eager(nn.Module):
    """Runs a module outside every graph, and one of ours inside."""

    def __init__(self, layer, **arguments):
        super().__init__()
        self.layer, self.arguments, self.attention = layer, arguments, Attention()

    def forward(self, x):
        return self.attention(self.outside(x))

    @torch._dynamo.disable
    def outside(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, **self.arguments)[0]
        return self.layer(x, **self.arguments)


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
LAYERS = {
    "fused-encoder-layer": lambda: Eager(encoder()),
    "fused-multi-head": lambda: Eager(nn.MultiheadAttention(16, 2, batch_first=True), need_weights=False),
    "multi-head": lambda: Eager(nn.MultiheadAttention(16, 2), need_weights=False),
    "multi-head-with-weights": lambda: Eager(nn.MultiheadAttention(16, 2), need_weights=True),
    "multi-head-with-a-mask": lambda: Eager(nn.MultiheadAttention(16, 2), need_weights=False, attn_mask=CAUSAL[:1, :1]),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())
def test_torchs_own_layers_outside_graphs_are_listed_once(build):
    report = sparge.explain(build().eval().requires_grad_(False), X, policy=EXACT)
    assert sorted((site.name, site.rewritten) for site in report.sites) == [("attention", True), ("layer", False)]
    (outside,) = report.dense
    assert OUTSIDE in outside.reason and outside.pattern == "mha" and report.notes == ()
    first = Eager.outside._torchdynamo_orig_callable.__code__.co_firstlineno
    assert outside.source in {f"{__file__}:{line}" for line in range(first, first + 5)}


def test_an_encoder_in_training_mode_outside_graphs_is_listed_by_its_attention():
    (outside,) = sparge.explain(Eager(encoder()).train(), X, policy=EXACT).dense
    assert outside.name == "layer.self_attn" and outside.pattern == "mha"


SOFTMAXES = {
    "method": lambda scores: scores.softmax(-1),
    "torch": lambda scores: torch.softmax(scores, -1),
    "functional": lambda scores: nn.functional.softmax(scores, dim=-1),
    "module": nn.Softmax(-1),
}


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES.keys())
def test_a_softmax_outside_graphs_is_noted_with_its_line(softmax):
    @torch._dynamo.disable
    def outside(x):
        return softmax(x @ x.transpose(1, 2)) @ x

    report = sparge.explain(lambda x: outside(x) + 1, X)
    (note,) = report.notes
    assert "attention written out by hand" in note and f"{__file__}:" in note and note in " ".join(str(report).split())
    assert report.sites == ()


def test_softmaxes_in_graphs_and_those_of_class_probabilities_are_not_noted():
    @torch._dynamo.disable
    def classify(x):
        return x[:, 0].softmax(-1)

    report = sparge.explain(lambda x: classify((x @ x.transpose(1, 2)).softmax(-1) @ x), X)
    assert report.notes == () and [site.pattern for site in report.sites] == ["softmax"]


def test_a_watched_model_has_no_note_about_profilers():
    assert sparge.explain(Attention().eval().requires_grad_(False), X, policy=EXACT).notes == ()


class Numbered(nn.Module):
    """Layers whose code is one and whose graphs are many: each bakes its number in, which is a text: no symbol."""

    def __init__(self, number):
        super().__init__()
        self.number = str(number)
        self.attention = Attention()

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.attention(x) + float(self.number)


@pytest.mark.skipif(not dynamo.ISOLATES, reason="torch 2.11 cannot keep compiles apart, so explain raises the limit")
def test_past_the_recompile_limit_a_call_says_so_and_not_that_its_graph_broke():
    model = nn.Sequential(*(Numbered(number) for number in range(5))).eval()
    with torch._dynamo.config.patch(recompile_limit=3):
        report = sparge.explain(model, X, policy=EXACT)
    late = report.dense
    assert late and all("recompile_limit allows" in site.reason for site in late)
    assert str(report).count("compiled in up to") == 1


def test_who_calls_explain_is_no_part_of_the_model():
    class Trainer(nn.Module):
        def explain(self, x):
            return sparge.explain(
                torch._dynamo.disable(lambda q: nn.functional.scaled_dot_product_attention(q, q, q)), x
            )

    (site,) = Trainer().explain(X).sites
    assert site.name == "<lambda>"


def test_explain_keeps_no_tensor_of_its_caller_alive():
    def caller():
        x = torch.randn(1, 2, 6, 8)
        alive = weakref.ref(x)
        sparge.explain(lambda q: nn.functional.scaled_dot_product_attention(q, q, q), x, policy=EXACT)
        del x
        gc.collect()
        return alive()

    assert caller() is None


SDPA = nn.functional.scaled_dot_product_attention
Q = torch.randn(1, 2, 6, 8)


def explained(function, *args):
    """The report of a function that runs outside every graph."""
    outside = torch._dynamo.disable(function)
    return sparge.explain(lambda *args: outside(*args) + 1, *args, policy=EXACT)


class Passing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def under(mode):
    def under_a_mode(q):
        with mode():
            return SDPA(q, q, q)

    return under_a_mode


CALLS = {
    "operator": lambda q: torch.ops.aten.scaled_dot_product_attention(q, q, q),
    "overload": lambda q: torch.ops.aten.scaled_dot_product_attention.default(q, q, q),
    "cpu-kernel": lambda q: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0],
    "function-mode": under(Passing),
    "dispatch-mode": under(Dispatching),
    "after-one-that-raised": lambda q: SDPA(q, q, q) if raises(lambda: SDPA(q, q[..., :3], q)) else None,
}


def raises(call):
    try:
        call()
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls_outside_are_listed_once_by_their_own_line(call):
    report = explained(call, Q)
    (site,) = report.sites
    assert site.name == call.__code__.co_name and site.source.startswith(f"{__file__}:") and site.pattern == "sdpa"
    assert not site.rewritten and report.notes == ()


def in_a_thread(q):
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(SDPA(q, q, q)))
    thread.start()
    thread.join()
    return outputs[0]


HIDDEN = {
    "partial": functools.partial(lambda call, q: call(q, q, q), functools.partial(SDPA, dropout_p=0.0)),
    "map": lambda q: next(map(SDPA, [q], [q], [q])),
    "thread": in_a_thread,
}


@pytest.mark.parametrize("call", HIDDEN.values(), ids=HIDDEN.keys())
def test_where_nothing_was_seen_a_note_says_what_is_not(call):
    report = explained(lambda q: call(q), Q)
    assert report.sites == ()
    (note,) = report.notes
    assert "functools.partial, map" in note and "threads" in note and note in " ".join(str(report).split())


def with_a_profiler(q):
    with torch.profiler.profile(with_stack=True):
        q = SDPA(q, q, q)
    return SDPA(q, q, q)


def with_a_hook_left_behind(q):
    sys.setprofile(ignore)
    return SDPA(q, q, q)


def ignore(*_):
    return None


@pytest.mark.parametrize("call", [with_a_profiler, with_a_hook_left_behind])
@pytest.mark.parametrize("graph_after", [False, True], ids=["alone", "a-graph-after"])
def test_a_profiler_that_the_model_starts_is_noted_and_left_alone(call, graph_after):
    function = Attention().eval().requires_grad_(False) if graph_after else (lambda x: x)
    outside = torch._dynamo.disable(call)
    try:
        report = sparge.explain(lambda x: function(outside(x[:, None])[:, 0]) + 1, X, policy=EXACT)
        assert sys.getprofile() is (ignore if call is with_a_hook_left_behind else None)
    finally:
        sys.setprofile(None)
    (note,) = report.notes
    assert "another profiler was active" in note
