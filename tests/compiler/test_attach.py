"""Attached profiles: blocks that share one compiled graph keep their own thresholds, and no other model is touched."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from light import EXACT, Attention, LightBackend, Stack, nodes_of
from torch import Tensor, nn

import sparge_compile as sparge
from sparge_compile import Policy, Profile, ProfileError
from sparge_compile.markers import mark
from sparge_kernels.thresholds import Thresholds

X = torch.randn(1, 700, 16).cumsum(1) / 26
POLICY = Policy(min_tokens=0, precision="none", similarity_threshold=-1.0, cdf_threshold=1.0)


class Block(nn.Module):
    """The attention is in a child, called by a helper, as in most libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn1(x)


class Net(nn.Module):
    def __init__(self, depth: int = 6, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def keep(topk: float) -> tuple[Thresholds, ...]:
    return (Thresholds(topk, 1.0, -1.0, None),)


def per_head(number: int) -> tuple[Thresholds, ...]:
    return (*keep(0.1 + 0.15 * number), *keep(1.0 - 0.1 * number))


def net(depth: int = 6, block: type[nn.Module] = Block) -> nn.Module:
    return Net(depth, block).eval().requires_grad_(False)


def profile(depth: int = 6, site: str = "blocks.{}.attn1") -> Profile:
    return Profile({site.format(n): per_head(n) for n in range(depth)})


def whole(model: nn.Module, own: Profile, policy: Policy = POLICY) -> Tensor:
    """What the model gives with the thresholds as constants of one graph."""
    backend = LightBackend(sparge.policy.replace(policy, {"profile": own}))
    out = torch.compile(model, backend=backend)(X)
    assert all(backend.rewritten)
    return out


def by_block(model: nn.Module, policy: Policy = POLICY) -> LightBackend:
    backend = LightBackend(policy)
    for block in model.blocks:
        block.compile(backend=backend)
    return backend


@pytest.fixture(params=["attached-first", "compiled-first"])
def attached_first(request):
    return request.param == "attached-first"


def test_six_blocks_in_one_graph_bring_their_own_thresholds(attached_first):
    model = net()
    expected = whole(model, profile())
    assert not torch.equal(expected, whole(model, Profile({s: per_head(0) for s in profile().sites})))
    if attached_first:
        attachment = sparge.attach(model, profile())
        backend = by_block(model)
    else:
        backend = by_block(model)
        model(X)
        backend.sites.clear(), backend.graphs.clear()
        attachment = sparge.attach(model, profile())
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected) and backend.compiles == 1
    (site,) = backend.sites
    assert (site.rewritten, site.threshold_source, site.thresholds) == (True, "attached profile", ())
    attachment.detach()


def test_blocks_that_hold_the_call_themselves_bring_their_own_thresholds():
    model, own = net(6, Attention), profile(site="blocks.{}")
    expected = whole(model, own)
    sparge.attach(model, own)
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 1


def test_blocks_compiled_as_modules_in_place_of_themselves():
    model, own = net(), profile()
    expected = whole(model, own)
    backend = LightBackend(POLICY)
    for n in range(6):
        model.blocks[n] = torch.compile(model.blocks[n], backend=backend)
    sparge.attach(model, own)
    assert torch.equal(model(X), expected) and backend.compiles == 1


def test_a_whole_compile_takes_the_attached_thresholds_too_and_they_win_over_the_policys():
    model, own = net(), profile()
    expected = whole(model, own)
    sparge.attach(model, own)
    other = Profile({site: keep(0.05) for site in own.sites})
    backend = LightBackend(sparge.policy.replace(POLICY, {"profile": other}))
    assert torch.equal(torch.compile(model, backend=backend)(X), expected)
    assert [site.threshold_source for site in backend.sites] == ["attached profile"] * 6


def test_a_block_that_the_profile_does_not_name_keeps_the_policys_thresholds():
    model = net(3)
    some = Profile({f"blocks.{n}.attn1": per_head(n) for n in (0, 2)})
    expected = whole(model, some)
    sparge.attach(model, some)
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 2
    assert sorted(site.threshold_source for site in backend.sites) == ["attached profile", "policy"]


def test_inductor_gives_what_the_graph_gives():
    model, own = net(3), profile(3)
    expected = whole(model, own)
    options = {"sparge.min_tokens": 0, "sparge.precision": "none"}
    with sparge.attach(model, own):
        for block in model.blocks:
            block.compile(backend="sparge", options=options, fullgraph=True)
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
