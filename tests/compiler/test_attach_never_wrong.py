"""Where an attached profile does not fit or is not seen the call stays dense, in words; markers leave no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attached_blocks import POLICY, Block, TwoCalls, X, by_block, keep, net, profile, whole
from light import Attention, LightBackend, nodes_of
from torch import Tensor, nn

import sparge_compile as sparge
from sparge_compile import Policy, Profile
from sparge_compile.markers import mark
from sparge_kernels.thresholds import Thresholds


@pytest.mark.parametrize("sites", [{"blocks.0": keep(0.3)}, {"blocks.0:3": keep(0.3)}], ids=["one", "third"])
def test_a_profile_of_another_number_of_calls_leaves_the_module_dense(sites):
    model = net(1, TwoCalls)
    expected = model(X)
    sparge.attach(model, Profile(sites))
    backend = by_block(model)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert all("this graph has 2 of its calls" in site.reason for site in backend.sites)


def test_a_profile_of_another_number_of_heads_leaves_the_call_dense_or_raises_under_strict():
    model = net(1)
    sparge.attach(model, Profile({"blocks.0.attn1": keep(0.3) * 3}))
    backend = by_block(model)
    model(X)
    assert "3 heads for this site, the call has 2" in backend.reason
    with sparge.rewriting(strict=True), pytest.raises(Exception, match="3 heads for this site"):
        model(X)


class Breaks(nn.Module):
    """A graph break between the start of the forward and the call."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2) * 1
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q, is_causal=self.training).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attached_before", [True, False], ids=["attached-first", "compiled-first"])
def test_a_call_behind_a_graph_break_stays_dense_while_attached_and_never_takes_other_thresholds(attached_before):
    model = net(2, Breaks)
    dense = model(X)
    attachment = sparge.attach(model, Profile({"blocks.0": keep(0.3)})) if attached_before else None
    backend = by_block(model)
    model(X)
    attachment = attachment or sparge.attach(model, Profile({"blocks.0": keep(0.3)}))
    assert torch.equal(model.blocks[0](X), net(1, Breaks)(X))
    assert {(s.rewritten, "graph break" in (s.reason or "")) for s in backend.sites} == {(True, False), (False, True)}
    attachment.detach()
    count = len(backend.sites)
    sparse = model(X)
    assert len(backend.sites) == count and not torch.equal(sparse, dense)


class DecoratedAttention(Attention):
    """A forward behind a decorator that takes anything, as `deprecate_kwarg` of transformers."""

    breaks = ""

    def forward(*args: Any) -> Tensor:
        if args[0].breaks == "before":
            torch._dynamo.graph_break()
        out = Attention.forward(*args)
        if args[0].breaks == "after":
            torch._dynamo.graph_break()
        return out


class BreaksBefore(DecoratedAttention):
    breaks = "before"


class BreaksAfter(DecoratedAttention):
    breaks = "after"


@pytest.mark.parametrize("attached_before", [True, False], ids=["attached-first", "compiled-first"])
@pytest.mark.parametrize("attention", [DecoratedAttention, BreaksBefore, BreaksAfter])
def test_behind_a_decorator_that_takes_anything_an_attached_profile_is_never_passed_over(attention, attached_before):
    class Decorated(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = attention()

    model, plain = net(2, Decorated), net(2)
    plain.load_state_dict(model.state_dict())
    backend = by_block(model)
    if not attached_before:
        model(X)
        backend.sites.clear()
    sparge.attach(model, profile(2))
    out = model(X)
    assert backend.sites, "it was not compiled anew"
    if attention is DecoratedAttention:
        assert {site.threshold_source for site in backend.sites} == {"attached profile"}
        torch.testing.assert_close(out, whole(plain, profile(2)), rtol=0, atol=0)
    else:
        assert all("a profile is attached to the module" in (site.reason or "") for site in backend.sites)


def marks(backend: LightBackend) -> tuple[int, int]:
    """Markers before and after the rewrite."""
    before = sum("mark_thresholds" in line for graph in backend.before for line in graph)
    graphs = [module for gm in backend.graphs for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]
    return before, len(nodes_of(graphs, mark))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class NoAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("block", "site", "policy"),
    [
        (Block, "blocks.0.attn1", Policy(enabled=False)),
        (Block, "blocks.0.attn1", Policy(dense=("*",), min_tokens=0)),
        (Block, "blocks.0.attn1", Policy(min_tokens=10_000)),
        (NoAttention, "blocks.0", POLICY),
    ],
    ids=["rewriting-off", "kept-dense", "short", "no-attention"],
)
@pytest.mark.filterwarnings("ignore:sparge:UserWarning")
def test_the_marker_leaves_no_trace_where_nothing_is_rewritten(block, site, policy):
    model = net(1, block)
    expected = model(X)
    sparge.attach(model, Profile({site: keep(0.3)}))
    backend = by_block(model, policy)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert marks(backend) == (1, 0)


def test_the_marker_leaves_no_trace_in_the_sub_graphs_of_checkpoints():
    model = net(1, Checkpointed)
    expected = model(X)
    sparge.attach(model, Profile({"blocks.0.attn1": keep(0.3)}))
    backend = by_block(model)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert marks(backend)[1] == 0 and not backend.sites[0].rewritten


CASTS = {
    "half": lambda model: model.half().float(),
    "to-bfloat16": lambda model: model.to(torch.bfloat16).float(),
    "double": lambda model: model.double().float(),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_the_numbers_survive_casts_and_copies_of_the_model(cast):
    own = Profile({"blocks.0.attn1": (Thresholds(0.1 + 1e-12, 1.0, -1.0, -7.123456789),)})
    model = net(1)
    sparge.attach(model, own)
    report = sparge.explain(cast(model), X, policy=POLICY)
    assert report.sites[0].thresholds == ({"topk": 0.1 + 1e-12, "cdf": 1.0, "similarity": -1.0, "pv": -7.123456789},)


def test_a_cast_of_integers_too_is_refused_in_words():
    model = net(1)
    expected = model(X)
    sparge.attach(model, profile(1))
    model.type(torch.float32)
    backend = by_block(model)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert "were changed to torch.float32" in backend.reason and "attach the profile again" in backend.reason


def test_an_unpickled_model_stays_dense_until_it_is_attached_anew():
    model, own = net(1), profile(1)
    dense, expected = model(X), whole(model, own)
    sparge.attach(model, own)
    again = pickle.loads(pickle.dumps(model))
    backend = by_block(again)
    torch.testing.assert_close(again(X), dense, rtol=0, atol=0)
    assert "unpickled" in backend.reason
    sparge.Attachment.of(again).detach()
    assert "forward" not in vars(again.blocks[0].attn1)
    sparge.attach(again, own)
    assert torch.equal(again(X), expected)


class Processor:
    """Not a module, as in diffusers; a graph break keeps it from being traced with the module that calls it."""

    def __call__(self, attn: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=-1))
        torch._dynamo.graph_break()
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.out(out)


class Processed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.processor = nn.Linear(16, 48), nn.Linear(16, 16), Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def test_a_call_in_a_processor_behind_a_graph_break_stays_dense_while_its_module_is_attached():
    model = net(1, Processed)
    backend = by_block(model)
    sparse, sites = model(X), len(backend.sites)
    with sparge.attach(model, Profile({"blocks.0": keep(0.3)})):
        model(X)
        assert "graph break" in (backend.sites[-1].reason or "") and len(backend.sites) == sites + 1
    assert torch.equal(model(X), sparse) and len(backend.sites) == sites + 1
