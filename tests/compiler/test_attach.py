"""Attached profiles: blocks that share one compiled graph keep their own thresholds."""

from __future__ import annotations

import pytest
import torch
from attached_blocks import POLICY, Block, Net, TwoCalls, X, by_block, keep, net, net_like, per_head, profile, whole
from light import EXACT, Attention, LightBackend
from torch import Tensor

import sparge_compile as sparge
from sparge_compile import Policy, Profile, ProfileError


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


@pytest.mark.parametrize("named", [(1, 2), (2,)], ids=["both", "the-second"])
def test_each_call_of_a_module_has_its_own_row(named):
    model = net(3, TwoCalls)
    sites = {f"blocks.{n}:{call}": per_head(n + call) if call == 2 else keep(0.3) for n in range(3) for call in named}
    expected = whole(model, Profile(sites))
    sparge.attach(model, Profile(sites))
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 1
    assert [s.threshold_source == "attached profile" for s in backend.sites] == [call in named for call in (1, 2)]


def test_a_module_called_twice_has_a_row_for_each_call():
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.blocks[0](x))

    model = Shared(1).eval().requires_grad_(False)
    own = Profile({"blocks.0.attn1:1": keep(0.2), "blocks.0.attn1:2": keep(0.7)})
    expected = whole(model, own)
    sparge.attach(model, own)
    backend = LightBackend(POLICY)
    assert torch.equal(torch.compile(model, backend=backend)(X), expected)
    assert {site.threshold_source for site in backend.sites} == {"attached profile"}


FIRST, SECOND = net(1), net(1)


def test_models_with_equal_paths_in_one_graph_are_told_apart():
    own = [Profile({"blocks.0.attn1": keep(topk)}) for topk in (0.2, 0.7)]
    first, second = FIRST, SECOND
    expected = whole(first, own[0]) + whole(second, own[1])
    with sparge.attach(first, own[0]), sparge.attach(second, own[1]):
        for function in (lambda x: FIRST(x) + SECOND(x), lambda x: first(x) + second(x)):
            backend = LightBackend(POLICY)
            assert torch.equal(torch.compile(function, backend=backend)(X), expected)
            assert len(backend.sites) == 2


def test_lengths_that_change_share_a_graph_too():
    attached, plain, own = net(), net(), profile()
    sparge.attach(attached, own)
    backends = [LightBackend(POLICY), LightBackend(POLICY)]
    for model, backend in zip((attached, plain), backends, strict=True):
        for block in model.blocks:
            block.compile(backend=backend, dynamic=True)
    for tokens in (700, 500, 650):
        x = X[:, :tokens].clone()
        plain(x)
        fixed = LightBackend(sparge.policy.replace(POLICY, {"profile": own}))
        expected = torch.compile(net_like(attached), backend=fixed)(x)
        assert torch.equal(attached(x), expected)
    assert backends[0].compiles == backends[1].compiles < 3


def test_a_site_with_one_entry_among_sites_with_an_entry_per_head_is_a_variant_of_its_own():
    model = net(3)
    own = Profile({**profile(3).sites, "blocks.1.attn1": keep(1.0)})
    expected = whole(model, own)
    sparge.attach(model, own)
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 2


def test_a_graph_break_beside_the_module_changes_nothing():
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model, own = net(3, Broken), profile(3)
    expected = whole(net_like(model), own)
    sparge.attach(model, own)
    backend = by_block(model)
    assert torch.equal(model(X), expected)
    assert [site.threshold_source for site in backend.sites] == ["attached profile"]


def test_attaching_and_detaching_again_and_again_compiles_each_state_once():
    model, own = net(), profile()
    dense_policy = whole(model, Profile({site: keep(1.0) for site in own.sites}))
    expected = whole(model, own)
    backend = by_block(model)
    for _ in range(12):
        with sparge.attach(model, own):
            assert torch.equal(model(X), expected)
        torch.testing.assert_close(model(X), dense_policy)
    assert backend.compiles == 2


def test_updated_numbers_need_no_recompile():
    model, first = net(), profile()
    second = Profile({site: entries[::-1] for site, entries in first.sites.items()})
    expected = [whole(model, own) for own in (first, second)]
    attachment = sparge.attach(model, first)
    backend = by_block(model)
    assert torch.equal(model(X), expected[0])
    attachment.update(second)
    assert torch.equal(model(X), expected[1]) and backend.compiles == 1
    with pytest.raises(ProfileError, match="other sites, or other numbers of heads"):
        attachment.update(Profile({"blocks.0.attn1": keep(0.5)}))
    attachment.detach()
    with pytest.raises(RuntimeError, match="nothing is attached"):
        attachment.update(first)


def test_a_profile_from_a_file_and_a_compiled_model(tmp_path):
    model, own = net(2), profile(2)
    expected = whole(model, own)
    own.save(tmp_path / "profile.json")
    backend = LightBackend(POLICY)
    compiled = torch.compile(model, backend=backend)
    with sparge.attach(compiled, tmp_path / "profile.json"):
        assert torch.equal(compiled(X), expected)


def test_a_model_that_is_its_only_attention_is_called_by_its_class():
    model = Attention().eval().requires_grad_(False)
    expected = whole(model, Profile({"Attention": keep(0.3)}))
    sparge.attach(model, Profile({"Attention": keep(0.3)}))
    backend = LightBackend(POLICY)
    assert torch.equal(torch.compile(model, backend=backend)(X), expected)
    assert backend.sites[0].threshold_source == "attached profile"


def test_explain_lists_each_compiled_block_by_its_own_name_and_thresholds():
    model, own = net(3), profile(3)
    sparge.attach(model, own)
    backend = by_block(model)
    model(X)
    report = sparge.explain(model, X, policy=POLICY)
    assert [site.name for site in report.sites] == list(own.sites)
    assert [tuple(entry["topk"] for entry in site.thresholds) for site in report.sites] == [
        tuple(entry.topk for entry in own.sites[site.name]) for site in report.sites
    ]
    assert all(0 < site.density < 1 and site.threshold_source == "attached profile" for site in report.sites)
    constants = sparge.explain(net_like(model), X, policy=sparge.policy.replace(POLICY, {"profile": own}))
    assert [site.density for site in report.sites] == [site.density for site in constants.sites]
    assert torch.equal(model(X), whole(net_like(model), own)) and backend.compiles == 1


def test_refused_sites_have_no_source_and_plain_ones_the_policys():
    backend = by_block(net(1), EXACT)
    for block in (net(1), net(1)):
        block.blocks[0].compile(backend=backend)
        block(X)
    assert {site.threshold_source for site in backend.sites} == {"policy"}
    report = sparge.explain(net(1), X, policy=Policy(min_tokens=10_000))
    assert report.sites[0].threshold_source is None


@pytest.mark.parametrize("predictor", ["clusters", "sparge"])
def test_the_predictor_of_a_profile_comes_with_its_thresholds(predictor):
    model = net()
    own = Profile(profile().sites, predictor=predictor)
    expected = whole(model, own)
    sparge.attach(model, own)
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 1
    assert [node.kwargs["predictor"] for node in backend.operators()] == [predictor]


def test_profiles_of_another_predictor_cannot_take_the_place_of_what_is_attached():
    model = net()
    with sparge.attach(model, profile()) as attachment, pytest.raises(ProfileError, match="another predictor"):
        attachment.update(Profile(profile().sites, predictor="sparge"))


def test_a_block_that_the_profile_keeps_dense_stays_dense():
    model, sites = net(), dict(profile().sites)
    del sites["blocks.1.attn1"]
    own = Profile(sites, dense={"blocks.1.attn1": "over the budget"})
    compiled = torch.compile(model, backend=(whole_backend := LightBackend(Policy(**{**vars(POLICY), "profile": own}))))
    expected = compiled(X)
    assert whole_backend.rewritten == [True, False, True, True, True, True]
    sparge.attach(model, own)
    backend = by_block(model)
    assert torch.equal(model(X), expected)
    assert sorted(backend.rewritten) == [False, True]
    assert [site.reason for site in backend.sites if not site.rewritten] == ["the attached profile keeps it dense"]


def test_a_calibrated_profile_attached_to_the_blocks_gives_what_the_whole_compile_gives():
    model = net(3)
    own = sparge.calibrate(model, [X, X + 0.1], policy=POLICY, progress=False)
    assert set(own.sites) | set(own.dense) == {f"blocks.{n}.attn1" for n in range(3)} and own.sites
    expected = torch.compile(model, backend=LightBackend(sparge.policy.replace(POLICY, {"profile": own})))(X)
    with sparge.attach(model, own):
        backend = by_block(model)
        assert torch.equal(model(X), expected)
    assert any(backend.rewritten)


def test_a_whole_models_profile_on_a_block_points_to_attach():
    model = net(2)
    own = sparge.calibrate(model, [X], policy=POLICY, progress=False)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"ProfileError.*attach\(model, profile\)"):
        torch.compile(model.blocks[0], backend=LightBackend(sparge.policy.replace(POLICY, {"profile": own})))(X)
