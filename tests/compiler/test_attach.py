"""Attached profiles: blocks that share one compiled graph keep their own thresholds, and no other model is touched."""

from __future__ import annotations

import copy
import pickle

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


class TwoCalls(nn.Module):
    """Two attention calls of one module: `name:1` and `name:2`."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        once = F.scaled_dot_product_attention(q, q, q)
        twice = F.scaled_dot_product_attention(once + q, q, q)
        return twice.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("named", [(1, 2), (2,)], ids=["both", "the-second"])
def test_each_call_of_a_module_has_its_own_row(named):
    model = net(3, TwoCalls)
    sites = {f"blocks.{n}:{call}": per_head(n + call) if call == 2 else keep(0.3) for n in range(3) for call in named}
    expected = whole(model, Profile(sites))
    sparge.attach(model, Profile(sites))
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 1
    assert [s.threshold_source == "attached profile" for s in backend.sites] == [call in named for call in (1, 2)]


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", None])
def test_other_backends_and_no_backend_run_the_model_as_before(backend):
    model = Stack(2).eval()
    before = [model(X), torch.compile(model, backend=backend)(X) if backend else model(X)]
    torch._dynamo.reset()
    sparge.attach(model, profile(2, "blocks.{}"))
    after = [model(X), torch.compile(model, backend=backend, fullgraph=True)(X) if backend else model(X)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradients_flow_under_other_backends():
    model = Stack(1)
    sparge.attach(model, profile(1, "blocks.{}"))
    torch.compile(model, backend="inductor")(X).sum().backward()
    compiled = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(X).sum().backward()
    for one, parameter in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_an_exported_model_holds_no_marker_and_no_table(strict):
    model = net(2)
    expected = model(X)
    sparge.attach(model, profile(2))
    program = torch.export.export(model, (X,), strict=strict)
    assert not any(node.target is mark for node in program.graph.nodes)
    assert not any("sparge" in key for key in program.state_dict)
    torch.testing.assert_close(program.module()(X), expected)


def snapshot(model: nn.Module) -> list[object]:
    return [
        (name, dict(vars(m)), dict(m._buffers), set(m._non_persistent_buffers_set), dict(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def test_detaching_leaves_the_model_as_it_was():
    model = net(2)
    before, keys = snapshot(model), list(model.state_dict())
    attachment = sparge.attach(model, profile(2))
    assert list(model.state_dict()) == keys and snapshot(model) != before
    model.load_state_dict(copy.deepcopy(model).state_dict())
    attachment.detach()
    attachment.detach()
    assert snapshot(model) == before
    with pytest.raises(KeyError), sparge.attach(model, profile(2)):
        raise KeyError
    assert snapshot(model) == before


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


def test_a_second_profile_on_one_module_is_an_error_that_changes_nothing():
    model, own = net(2), profile(2)
    expected = whole(model, own)
    sparge.attach(model, Profile({"blocks.1.attn1": per_head(1)}))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"attached already: detach that.*or update\(\) it"):
        sparge.attach(model, own)
    assert snapshot(model) == before
    sparge.attach(model, Profile({"blocks.0.attn1": per_head(0)}))  # another module: no conflict
    backend = by_block(model)
    assert torch.equal(model(X), expected) and backend.compiles == 1


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


def test_a_profile_of_another_model_is_an_error_that_changes_nothing():
    model = net(2)
    before = snapshot(model)
    with pytest.raises(
        ProfileError, match=r"another model: Net has no module for 2 of its 4.*blocks.2.attn1, blocks.3"
    ):
        sparge.attach(model, profile(4))
    assert snapshot(model) == before


WRONG = {
    "mixed-calls": (lambda: Profile({"blocks.0": keep(1.0), "blocks.0:1": keep(1.0)}), ProfileError, "as several"),
    "no-profile": (lambda: {"blocks.0": keep(1.0)}, TypeError, "must be a Profile or the path of one"),
    "no-file": (lambda: "/no/such/profile.json", ProfileError, "does not exist"),
}


@pytest.mark.parametrize("given, error, message", WRONG.values(), ids=WRONG.keys())
def test_a_profile_that_cannot_be_attached_says_why(given, error, message):
    with pytest.raises(error, match=message):
        sparge.attach(Stack(1), given())


def test_one_module_under_two_names_is_an_error():
    model = Stack(1)
    model.alias = model.blocks[0]
    with pytest.raises(ProfileError, match=r"one module twice, as 'blocks\.0' and 'alias'"):
        sparge.attach(model, Profile({"blocks.0": keep(1.0), "alias": keep(0.5)}))


def test_only_a_module_on_a_real_device_can_be_attached_to():
    with pytest.raises(RuntimeError, match="meta device; load its weights"):
        sparge.attach(Stack(1).to("meta"), profile(1, "blocks.{}"))
    with pytest.raises(TypeError, match=r"takes the nn\.Module"):
        sparge.attach(lambda x: x, profile(1))


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


def test_tables_lie_on_the_modules_device():
    model = net(1)
    sparge.attach(model, profile(1))
    assert [b.dtype for b in model.buffers()] == [torch.int64]
    model.to("meta")
    assert {b.device.type for b in model.buffers()} == {"meta"}


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


def net_like(model: nn.Module) -> nn.Module:
    """An unattached, uncompiled model with the same weights."""
    other = net(len(model.blocks))
    other.load_state_dict(model.state_dict())
    return other


def wrapped(module: nn.Module) -> list[int]:
    """What offloading libraries do: a forward of the instance's own around the one before. Returns its calls."""
    before, calls = module.forward, []

    def forward(*args):
        calls.append(1)
        return before(*args)

    module.forward = forward
    return calls


def test_a_forward_that_another_library_put_on_the_instance_is_kept_below_and_above():
    model, own = net(1), profile(1)
    expected, attention = whole(model, own), model.blocks[0].attn1
    below = wrapped(attention)
    other = attention.forward
    attachment = sparge.attach(model, own)
    model(X)
    assert below == [1]
    attachment.detach()
    assert attention.forward is other
    attachment = sparge.attach(model, own)
    wrapped(attention)
    attachment.detach()
    model(X)
    attachment = sparge.attach(model, own)
    del below[:]
    model(X)
    assert below == [1]
    backend = by_block(model)
    assert torch.equal(model(X), expected)
    assert backend.sites[-1].threshold_source == "attached profile"


def test_refused_sites_have_no_source_and_plain_ones_the_policys():
    backend = by_block(net(1), EXACT)
    for block in (net(1), net(1)):
        block.blocks[0].compile(backend=backend)
        block(X)
    assert {site.threshold_source for site in backend.sites} == {"policy"}
    report = sparge.explain(net(1), X, policy=Policy(min_tokens=10_000))
    assert report.sites[0].threshold_source is None


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


def test_a_copy_of_an_attached_model_is_attached_and_can_be_detached_on_its_own():
    model, own = net(2), profile(2)
    expected = whole(model, own)
    sparge.attach(model, own)
    other = copy.deepcopy(model)
    backend = by_block(other)
    assert torch.equal(other(X), expected) and backend.compiles == 1
    sparge.Attachment.of(other).detach()
    assert list(other.buffers()) == [] and len(list(model.buffers())) == 2
    by_block(model)
    assert torch.equal(model(X), expected)


def test_the_blocks_of_a_diffusers_model_bring_their_own_thresholds():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
        cross_attention_dim=16, caption_channels=16, sample_size=40, patch_size=2, norm_num_groups=4,
    ).eval().requires_grad_(False)  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 40, 40),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    own = Profile({f"transformer_blocks.{n}.attn1": per_head(n) for n in range(3)})
    policy = sparge.policy.replace(POLICY, {"min_tokens": 100})
    constants = LightBackend(sparge.policy.replace(policy, {"profile": own}))
    expected = torch.compile(model, backend=constants)(**inputs)[0]
    with sparge.attach(model, own):
        backend = LightBackend(policy)
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert torch.equal(model(**inputs)[0], expected)
    assert backend.compiles == 1
    assert [site.threshold_source for site in backend.sites] == ["attached profile", None]
