"""Calibrated thresholds keep their promise on the kernel, by an independent measure; and every way not to calibrate."""

import gc
import json
import weakref
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from calibrated import POLICY, QUIET, Attends, structured_and_random
from light import Attention, Stack, qkv, run
from torch import nn

import sparge_compile as sparge
from sparge_compile import Policy, Profile, calibration, dynamo, search
from sparge_compile.attaching import attached_thresholds
from sparge_compile.profile import Measurement
from sparge_compile.search import Call, candidates, compare, measure
from sparge_compile.verify import Found, Unfit, Verified
from sparge_kernels import ops
from sparge_kernels.predict import select_tiles
from sparge_kernels.reference import attention_scores, visible_pairs
from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds, pack
from sparge_kernels.tiles import diagonal_tiles


def relative_errors(profile, site, q, k, v, **options):
    """Relative L1 and worst cosine of each head, kernel against fp64 attention."""
    out = torch.ops.sparge.attention(
        q, k, v, thresholds=pack(profile.sites[site]), predictor=profile.predictor, **options
    )
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    error = (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    return error, F.cosine_similarity(out.double(), dense, dim=-1).amin((0, 2))


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.1}], ids=["plain", "causal", "scale"])
def test_each_head_keeps_its_budget_and_structure_pays(arguments):
    q, k, v = structured_and_random()
    profile = sparge.calibrate(Attends(**arguments), [(q, k, v)], max_error=0.05, **QUIET)
    errors, worst = relative_errors(profile, "inner", q, k, v, **arguments)
    measured = profile.measured["inner"]
    assert len(profile.thresholds_of("inner")) == 2
    for head, entry in enumerate(measured):
        assert errors[head] <= 0.05 and worst[head] >= 0.95
        assert entry.error == pytest.approx(errors[head].item(), rel=0.01, abs=1e-4)
        assert entry.worst_row == pytest.approx(worst[head].item(), abs=1e-3)
    assert measured[1].density < 0.9 * measured[0].density


def test_a_larger_budget_gives_a_sparser_profile():
    inputs = [structured_and_random()]
    densities = [
        sparge.calibrate(Attends(), inputs, max_error=budget, min_row_cosine=-1, **QUIET).measured["inner"][1].density
        for budget in (0.03, 0.3)
    ]
    assert densities[1] < densities[0]


def test_a_batch_cross_attention_and_shared_keys():
    q, k, v = structured_and_random(tokens=512, batch=2)
    q = torch.cat([q, q.flip(0)], dim=1)
    k, v = k[:, :, :300], v[:, :, :300]
    profile = sparge.calibrate(Attends(enable_gqa=True), [(q, k, v)], max_error=0.1, **QUIET)
    assert len(profile.sites["inner"]) == 4
    errors, worst = relative_errors(profile, "inner", q, k, v, enable_gqa=True)
    assert bool((errors <= 0.1).all()) and bool((worst >= 0.95).all())
    found = torch.tensor([m.error for m in profile.measured["inner"]])
    torch.testing.assert_close(found, errors.float(), rtol=0.01, atol=1e-4)


def test_the_profile_works_in_a_compile_and_matches_its_own_density():
    q, k, v = structured_and_random()
    model = Attends()
    profile = sparge.calibrate(model, [(q, k, v)], **QUIET)
    (site,) = sparge.explain(model, q, k, v, policy=Policy(min_tokens=0, profile=profile)).sites
    assert site.rewritten and len(site.thresholds) == 2
    assert site.density == pytest.approx(sum(m.density for m in profile.measured["inner"]) / 2, abs=1e-5)


def brute_force(call, entry, rows, predictor="clusters"):
    """Attention over the tiles that `entry` keeps for head 0, fp32, rows [n] of them."""
    q, k, v = call.query[:, :1], call.key[:, :1], call.value[:, :1]
    kept = select_tiles(q, k, v, thresholds=[entry], is_causal=call.is_causal, scale=call.scale, predictor=predictor)
    lengths = (q.shape[2], k.shape[2])
    exact = diagonal_tiles(*lengths, call.is_causal, q.device)
    scores = attention_scores(q, k, exact=exact, scale=call.scale, precision=call.precision)
    seen = kept.repeat_interleave(Q_TILE, 2).repeat_interleave(K_TILE, 3)[..., : lengths[0], : lengths[1]]
    seen = seen & visible_pairs(*lengths, call.is_causal, q.device)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)[0, 0, rows], kept


@pytest.mark.parametrize(("precision", "predictor"), [("int8", "clusters"), ("none", "clusters"), ("int8", "sparge")])
@pytest.mark.parametrize(
    ("q_len", "k_len", "is_causal"),
    [(512, 512, False), (300, 500, False), (500, 500, True), (700, 300, True), (130, 900, True)],
    ids=["whole", "cross", "causal", "more-queries", "more-keys"],
)
def test_one_look_gives_each_candidate_what_a_run_of_it_gives(q_len, k_len, is_causal, precision, predictor):
    q, k, v = (x[:, 1:] for x in structured_and_random(1024))
    call = Call(q[:, :, :q_len], k[:, :, :k_len], v[:, :, :k_len], torch.empty(0), is_causal, 0.2, precision)
    dense = F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=is_causal, scale=0.2)
    call = Call(call.query, call.key, call.value, dense, is_causal, 0.2, precision)
    tried = (Thresholds(None, 0.3, 0.0, None), Thresholds(None, 0.9, 0.5, None), Thresholds(0.3, 1.0, -1.0, None))
    tried = (*tried, Thresholds(1.0, 1.0, 1.0, None))
    sums = measure(call, tried, predictor)
    rows = torch.arange(q_len)  # fewer tiles than are sampled: all of them
    for number, entry in enumerate(tried):
        output, kept = brute_force(call, entry, rows, predictor)
        error, total, worst = compare(output, dense[0, 0])
        found = [x[0, number] for x in (sums.error, sums.worst, sums.kept)]
        expected = torch.stack([error, worst, kept.sum()]).double()
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sums.total[0], total.double(), rtol=1e-4, atol=1e-4)
    in_pieces = measure(call, tried, predictor, rows_at_a_time=32)
    torch.testing.assert_close(in_pieces.error, sums.error, rtol=1e-4, atol=1e-4)


def test_keys_that_int8_cannot_hold_are_exact_in_the_estimate_too():
    q, k, v = qkv(batch=1, heads=1, tokens=256, dim=32)
    k[0, 0, 70] *= 300
    q[0, 0, 5] = 0
    dense = F.scaled_dot_product_attention(q, k, v)
    call = Call(q, k, v, dense, False, 32**-0.5, "int8")
    entry = Thresholds(1.0, 1.0, 1.0, None)
    error, _, worst = compare(brute_force(call, entry, torch.arange(256))[0], dense[0, 0])
    sums = measure(call, (entry,), "clusters")
    assert sums.error[0, 0] == pytest.approx(error.item(), rel=1e-3)
    assert sums.worst[0, 0] == pytest.approx(worst.item(), abs=1e-4)


def test_sampled_tiles_are_spread_and_hold_the_last():
    for q_len in (1, 128, 129, 1500, 4096, 100_000):
        tiles, count = search.sampled_tiles(q_len), -(-q_len // Q_TILE)
        assert tiles[-1] == count - 1 and len(tiles) == min(count, search.SAMPLED_TILES) and tiles == sorted(set(tiles))


def break_inside(x):
    torch._dynamo.graph_break()
    return x


class BreakingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(break_inside(x))


def test_blocks_that_share_a_graph_are_calibrated_apart():
    model = nn.Sequential(BreakingBlock(), BreakingBlock(), BreakingBlock()).eval()
    profile = sparge.calibrate(model, [torch.randn(1, 300, 16)], **QUIET)
    assert sorted(profile.sites) == ["0.attention", "1.attention", "2.attention"]
    errors = [profile.measured[name][0].error for name in sorted(profile.sites)]
    assert len(set(errors)) == 3


class BreaksInForward(Attention):
    """Whose attention call is traced apart from its module: three of them share one name."""

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(break_inside(x)).chunk(3, dim=-1))
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_calls_cut_off_from_their_module_are_not_calibrated():
    model = nn.Sequential(Attention(), BreaksInForward(), BreaksInForward()).eval()
    profile = sparge.calibrate(model, [torch.randn(1, 200, 16)], **QUIET)
    assert list(profile.sites) == ["0"] and not profile.dense
    assert any("a graph break inside the module's forward" in reason for reason in profile.not_calibrated.values())
    with pytest.raises(ValueError, match=r"nothing to calibrate:\n  .*a graph break inside the module's forward"):
        sparge.calibrate(model[1:], [torch.randn(1, 200, 16)], **QUIET)


@pytest.mark.parametrize(
    "make", [lambda: Stack(2), lambda: nn.Sequential(BreakingBlock(), BreakingBlock())], ids=["whole", "graph-break"]
)
def test_what_is_attached_to_the_model_is_ignored_and_stays(make):
    model, inputs = make().eval(), [torch.randn(1, 200, 16)]
    expected = sparge.calibrate(model, inputs, **QUIET)
    other = Profile({name: (Thresholds(0.2, 1.0, -1.0, None),) for name in expected.sites})
    with sparge.attach(model, other):
        assert sparge.calibrate(model, inputs, **QUIET) == expected
        assert all(attached_thresholds(model, name) == entries for name, entries in other.sites.items())


INPUTS = {
    "tensor": lambda x: [x],
    "tuple": lambda x: [(x,)],
    "dict": lambda x: [{"x": x}],
    "iterator": lambda x: iter([x]),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_inputs_of_every_kind_give_the_same_profile(make):
    x = torch.randn(1, 200, 16)
    model = Stack(1).eval()
    assert sparge.calibrate(model, make(x), **QUIET) == sparge.calibrate(model, [x], **QUIET)


def test_the_model_and_its_compiles_are_left_as_they_were():
    model = Stack(1).train()
    model.compile(backend="eager")
    implementation, state = model._compiled_call_impl, {n: t.clone() for n, t in model.state_dict().items()}
    sparge.calibrate(model, [torch.randn(1, 200, 16)], **QUIET)
    assert model._compiled_call_impl is implementation and model.training and torch.is_grad_enabled()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_profile_says_where_it_is_from(capsys):
    model = Stack(1).eval()
    profile = sparge.calibrate(torch.compile(model), [torch.randn(1, 200, 16)], max_error=0.04, policy=POLICY)
    assert "calibrate" in capsys.readouterr().err
    profile.check_model(model)
    assert profile.origin.device.startswith("cpu ") and profile.origin.torch == torch.__version__
    assert (profile.origin.max_error, profile.origin.min_row_cosine) == (0.04, 0.95)
    sparge.calibrate(model, [torch.randn(1, 200, 16)], **QUIET)
    assert capsys.readouterr().err == ""


def test_inputs_of_several_lengths_are_one_site():
    model = Stack(1).eval()
    inputs = [torch.randn(1, tokens, 16) for tokens in (200, 300, 130)]
    profile = sparge.calibrate(model, inputs, **QUIET)
    assert list(profile.sites) == ["blocks.0"] and not profile.not_calibrated


def test_under_autocast_the_site_is_measured_in_its_own_dtype():
    model = Stack(1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        profile = sparge.calibrate(model, [torch.randn(1, 200, 16)], **QUIET)
    assert list(profile.sites) == ["blocks.0"] and profile.measured["blocks.0"][0].error < 0.05


def test_calls_outside_every_graph_are_listed_with_that_reason():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = Attention(), Attention()

        def forward(self, x):
            return torch._dynamo.disable(self.outside)(self.inside(x))

    profile = sparge.calibrate(Mixed().eval(), [torch.randn(1, 200, 16)], **QUIET)
    assert list(profile.sites) == ["inside"] and "outside every compiled graph" in profile.not_calibrated["outside"]


def test_a_function_is_calibrated_too():
    q, k, v = structured_and_random(512)
    profile = sparge.calibrate(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [(q, k, v)], **QUIET)
    assert len(profile.sites) == 1 and profile.origin.model is None


def test_sites_the_policy_leaves_alone_are_listed_with_their_reason():
    policy = Policy(min_tokens=0, dense=("*.1",))
    profile = sparge.calibrate(Stack(2).eval(), [torch.randn(1, 200, 16)], policy=policy, progress=False)
    assert list(profile.sites) == ["blocks.0"] and "dense pattern" in profile.not_calibrated["blocks.1"]


ERRORS = {
    "zero-budget": ({"max_error": 0}, "no sparse or quantized kernel is without error"),
    "negative-budget": ({"max_error": -0.1}, r"must be in \(0, 1\)"),
    "whole-budget": ({"max_error": 1}, r"must be in \(0, 1\)"),
    "cosine": ({"min_row_cosine": 1.0}, r"must be in \[-1, 1\)"),
    "disabled": ({"policy": Policy(enabled=False)}, "the policy is disabled"),
    "short": ({"policy": Policy(min_tokens=500)}, r"blocks\.0: 200 queries and 200 keys, min_tokens is 500"),
    "fp8": ({"policy": Policy(min_tokens=0, precision="fp8")}, r"blocks\.0: precision='fp8'"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_calibrated_is_an_error_that_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        sparge.calibrate(Stack(1).eval(), [torch.randn(1, 200, 16)], **{**QUIET, **change})


@pytest.mark.parametrize("name", ["max_error", "min_row_cosine"])
@pytest.mark.parametrize("wrong", ["0.05", None, [0.05], torch.tensor(0.05)], ids=["text", "none", "list", "tensor"])
def test_a_bound_that_is_no_number_is_an_error_in_words(name, wrong):
    with pytest.raises(TypeError, match=rf"{name}=.*must be a number, not {type(wrong).__name__}\."):
        sparge.calibrate(Stack(1).eval(), [torch.randn(1, 200, 16)], **QUIET, **{name: wrong})


def test_a_bound_may_be_any_real_number():
    profile = sparge.calibrate(
        Stack(1).eval(), [torch.randn(1, 200, 16)], max_error=Fraction(1, 20), min_row_cosine=0, **QUIET
    )
    assert (profile.origin.max_error, profile.origin.min_row_cosine) == (0.05, 0.0)


def test_the_model_runs_twice_on_each_input_in_the_mode_it_is_in():
    model, modes = Stack(1).eval(), []
    model.register_forward_hook(lambda *_: modes.append(model.training))
    sparge.calibrate(model, [torch.randn(1, 200, 16)] * 2, **QUIET)
    sparge.calibrate(model.train(), [torch.randn(1, 200, 16)], **QUIET)
    assert modes == [False] * 4 + [True] * 2


@pytest.mark.parametrize("empty", [[], iter([]), range(0)], ids=["list", "iterator", "range"])
def test_no_inputs_are_an_error(empty):
    with pytest.raises(ValueError, match="inputs is empty"):
        sparge.calibrate(Stack(1).eval(), empty, **QUIET)


@pytest.mark.parametrize("wrong", [torch.randn(2, 200, 16), {"x": 1}, 3], ids=["tensor", "dict", "number"])
def test_a_batch_in_place_of_batches_is_an_error(wrong):
    with pytest.raises(TypeError, match="iterable of batches"):
        sparge.calibrate(Stack(1).eval(), wrong, **QUIET)


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match="reach no attention call"):
        sparge.calibrate(nn.Linear(16, 2), [torch.randn(1, 16)], **QUIET)


def test_a_kernel_that_cannot_run_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda *_, **__: "the kernel is not built")
    with pytest.raises(ValueError, match=r"blocks\.0: the kernel is not built"):
        sparge.calibrate(Stack(1).eval(), [torch.randn(1, 200, 16)], **QUIET)


def test_nan_makes_its_own_site_dense_with_that_reason():
    model = Stack(2).eval()
    model.blocks[1].qkv.bias.data[20] = torch.nan
    profile = sparge.calibrate(model, [torch.randn(1, 200, 16)], **QUIET)
    assert list(profile.sites) == ["blocks.0"]
    assert profile.dense == {"blocks.1": "its dense output holds NaN or inf"}


def test_a_budget_that_int8_alone_breaks_makes_the_site_dense():
    profile = sparge.calibrate(Attends(), [structured_and_random(512)], max_error=1e-5, **QUIET)
    assert not profile.sites and "head 0 with every tile kept has a relative L1 of" in profile.dense["inner"]


def optimistic(*args, **kwargs):
    """An estimate by which every candidate is good."""
    sums = measure(*args, **kwargs)
    sums.error.mul_(torch.linspace(0.02, 0.01, sums.error.shape[1], dtype=torch.float64))
    sums.worst.fill_(1)
    return sums


@pytest.mark.parametrize("heads", [2, 4], ids=["heads", "shared-keys"])
def test_a_wrong_estimate_is_caught_by_the_kernel(monkeypatch, heads):
    """Thresholds that look good on the sampled tiles and are not are stepped back from."""
    monkeypatch.setattr(calibration, "measure", optimistic)
    q, k, v = structured_and_random()
    q = torch.cat([q, q.flip(1)], dim=1)[:, :heads]
    profile = sparge.calibrate(Attends(enable_gqa=True), [(q, k, v)], **QUIET)
    errors, worst = relative_errors(profile, "inner", q, k, v, enable_gqa=True)
    assert bool((errors <= 0.05).all()) and bool((worst >= 0.95).all())
    found = torch.tensor([m.error for m in profile.measured["inner"]])
    torch.testing.assert_close(found, errors.float(), rtol=0.01, atol=1e-4)


def test_heads_step_back_twice_as_far_each_time_and_the_rest_stays(monkeypatch):
    runs = []

    def fake(call, heads, thresholds, predictor):
        runs.append((heads, thresholds))
        errors = {0: 0.01, 1: 0.01 if thresholds[-1] >= 5 else 0.9}
        return [Found(errors[head], 1.0, 0.99, 0.5, 1) for head in heads]

    monkeypatch.setattr(Verified, "_run", staticmethod(fake))
    call = Call(torch.empty(1, 2, 128, 4), torch.empty(1, 2, 128, 4), *[torch.empty(0)] * 2, False, 1.0, "int8")
    site = Verified([[0, 9], [0, 1, 2, 5, 7, 9]])
    site.verify(call, tuple(range(10)), "clusters", 0.05, 0.9)
    assert runs == [([0, 1], [0, 0]), ([1], [1]), ([1], [5])]
    assert [site.chosen(head) for head in (0, 1)] == [0, 5]
    assert [site.measurement(head).error for head in (0, 1)] == [0.01, 0.01]
    assert Verified(**json.loads(json.dumps(site.to_json()))) == site
    monkeypatch.setattr(Verified, "_run", staticmethod(lambda *_: [Found(0.9, 1.0, 0.5, 1.0, 1)] * 2))
    with pytest.raises(Unfit, match=r"head 0 with every tile kept has a relative L1 of 0\.9 .*a row of cosine 0\.5"):
        Verified([[9], [9]]).verify(call, tuple(range(10)), "clusters", 0.05, 0.9)


def test_a_head_that_steps_back_keeps_its_error_and_counts_its_density_anew(monkeypatch):
    results = iter([Found(0.04, 1.0, 0.96, 0.2, 1), Found(0.9, 1.0, 0.5, 0.2, 1), Found(0.02, 1.0, 0.99, 0.6, 1)])
    monkeypatch.setattr(Verified, "_run", staticmethod(lambda *_: [next(results)]))
    call = Call(torch.empty(1, 1, 128, 4), torch.empty(1, 1, 128, 4), *[torch.empty(0)] * 2, False, 1.0, "int8")
    site = Verified([[0, 1]])
    for _ in range(2):
        site.verify(call, (0, 1), "clusters", 0.05, 0.9)
    assert site.chosen(0) == 1 and site.measurement(0) == Measurement(pytest.approx(0.03), 0.96, 0.6)


@pytest.mark.skipif(not dynamo.ISOLATES, reason="torch 2.11 cannot keep compiles apart; calibrate's docstring says so")
def test_many_calibrations_leave_room_to_compile():
    model, x = Stack(1).eval(), torch.randn(1, 200, 16)
    profiles = {sparge.calibrate(model, [x], max_error=0.03 + 0.001 * i, **QUIET) for i in range(10)}
    profiles |= {sparge.calibrate(model, [x], policy=Policy(min_tokens=i), progress=False) for i in range(10)}
    assert len(profiles) == 11  # the budget is part of a profile, a minimum that is met is not
    _, backend = run(model, x)
    assert backend.rewritten == [True]


def test_a_kernel_that_fails_makes_the_site_dense(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr("sparge_compile.verify.Verified._run", fail)
    profile = sparge.calibrate(Stack(1).eval(), [torch.randn(1, 200, 16)], **QUIET)
    assert profile.dense == {"blocks.0": "calibration failed: RuntimeError: no such instruction"}


def test_short_memory_is_met_with_smaller_pieces_then_a_dense_site(monkeypatch):
    asked = []

    def hungry(call, tried, predictor, rows):
        asked.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("out of memory")
        return measure(call, tried, predictor, rows)

    monkeypatch.setattr(calibration, "measure", hungry)
    limit, x = 40, torch.randn(1, 200, 16)
    assert "blocks.0" in sparge.calibrate(Stack(1).eval(), [x], **QUIET).sites and asked == [128, 32]
    limit = 0
    profile = sparge.calibrate(Stack(1).eval(), [x], **QUIET)
    assert profile.dense == {"blocks.0": "calibration failed: OutOfMemoryError: out of memory"}


def test_errors_add_up_over_inputs_and_the_worst_row_is_the_worst():
    first, second = structured_and_random(512), tuple(x.flip(2) * 1.5 for x in structured_and_random(512))
    model = Attends()
    profile = sparge.calibrate(model, [first, second], max_error=0.1, min_row_cosine=0.5, **QUIET)
    both = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    errors, worst = relative_errors(profile, "inner", *both)
    for head, entry in enumerate(profile.measured["inner"]):
        assert errors[head] <= entry.error * 1.01 + 1e-4 <= 0.11 and worst[head] >= entry.worst_row - 1e-3


def test_the_candidates_end_with_one_that_keeps_everything():
    for predictor in ("clusters", "sparge"):
        tried = candidates(predictor, -7.0)
        assert tried[-1] == Thresholds(1.0, 1.0, 1.0, -7.0) and len(set(tried)) == len(tried)


def test_a_profile_of_a_calibration_round_trips(tmp_path):
    profile = sparge.calibrate(Stack(2).eval(), [torch.randn(1, 200, 16)], **QUIET)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert all(len(line) <= 100 for line in str(profile).splitlines())


def test_calibrate_keeps_no_model_alive():
    model = Stack(1).eval()
    sparge.calibrate(model, [torch.randn(1, 300, 16)], **QUIET)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
