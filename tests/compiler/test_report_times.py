"""`explain` times each call, dense and sparse, and keeps the tiles that the kernel chose."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from light import EXACT, EXACT_FIELDS, Attention, Stack
from test_explain import Mixed, Twice, bounded
from torch import nn

import sparge_compile as sparge
from sparge_compile import Policy, SiteReport
from sparge_compile.report import Report
from sparge_kernels import records
from sparge_kernels.masks import additive_mask, causal_tiles, mask_tiles
from sparge_kernels.ops import CallTimer

X = torch.randn(1, 6, 16)
SPARSE = Policy(min_tokens=0, cdf_threshold=0.8)


class Clock:
    """A CallTimer by which every dense call takes 8 ms and every sparse one 2; counts them."""

    def __init__(self):
        self.runs = []

    def __call__(self, calls, tensors):
        self.runs.append(len(calls))
        return [8.0, 2.0][: len(calls)]


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("sparge_compile.explain_calls.ops.CallTimer", lambda: made)
    return made


def test_rewritten_and_dense_calls_are_timed_and_added_up(clock):
    report = sparge.explain(Stack(3).eval(), X, policy=Policy(**{**EXACT_FIELDS, "dense": ("*.1",)}))
    assert [(site.dense_ms, site.sparse_ms, site.calls) for site in report.sites] == [
        (8, 2, 1),
        (8, None, 1),
        (8, 2, 1),
    ]
    assert report.speedup == 24 / 12 and clock.runs == [2, 1, 2]
    assert "2.0 times as fast as dense (12 instead of 24 ms)" in str(report)


def test_a_site_that_runs_several_times_has_the_times_of_all_its_calls(clock):
    inputs = [torch.randn(1, 40, 16) for _ in range(3)]
    (site,) = sparge.explain(Twice().eval(), *inputs, policy=EXACT).sites
    assert (site.calls, site.dense_ms, site.sparse_ms) == (3, 24, 6)


def test_the_density_of_a_site_is_the_mean_of_its_calls():
    flat, peaked = torch.zeros(1, 400, 16), 9 * torch.randn(1, 400, 16).cumsum(1)
    model = Twice().eval()
    alone = [sparge.explain(model, x, policy=SPARSE, timing=False).sites[0] for x in (flat, peaked)]
    (both,) = sparge.explain(model, flat, peaked, policy=SPARSE, timing=False).sites
    assert alone[0].density != alone[1].density
    assert both.density == pytest.approx((alone[0].density + alone[1].density) / 2)
    expected = [(a + b) / 2 for a, b in zip(*(site.head_densities for site in alone), strict=True)]
    assert both.head_densities == pytest.approx(expected)


def test_calls_outside_graphs_are_not_timed_and_are_said_to_be(clock):
    report = sparge.explain(Mixed().eval(), X, policy=EXACT)
    (eager,) = report.dense
    assert eager.dense_ms is None and eager.calls == 1 and report.speedup == 4
    assert "1 of 3 calls not timed" in " ".join(str(report).split())


def test_what_the_operator_runs_dense_is_timed_as_dense(clock):
    (site,) = sparge.explain(
        lambda x: F.scaled_dot_product_attention(x, x, x), bounded(40), policy=Policy(min_tokens=64)
    ).sites
    assert not site.rewritten and (site.dense_ms, site.sparse_ms) == (8, None)


def test_dense_calls_with_dropout_are_run_once(clock):
    torch.manual_seed(3)
    expected = Attention(dropout_p=0.5)
    model = Attention(dropout_p=0.5)
    model.load_state_dict(expected.state_dict())
    torch.manual_seed(4)
    sparge.explain(model, X, policy=EXACT, timing=True)
    after_explain = torch.rand(1)
    torch.manual_seed(4)
    sparge.explain(model, X, policy=EXACT, timing=False)
    assert torch.equal(torch.rand(1), after_explain) and clock.runs == []


def test_without_timing_nothing_runs_twice(clock):
    report = sparge.explain(Stack(2).eval(), X, policy=EXACT, timing=False)
    assert clock.runs == [] and report.speedup is None and "attention part" not in str(report)
    assert all(site.dense_ms is None and site.sparse_ms is None for site in report.sites)


def test_times_are_those_of_the_call_with_its_mask_and_shared_heads(monkeypatch):
    seen = []
    dense = F.scaled_dot_product_attention

    def listening(*args, **kwargs):
        seen.append((args, kwargs))
        return dense(*args, **kwargs)

    q, k = torch.randn(2, 4, 70, 8, dtype=torch.bfloat16), torch.randn(2, 2, 90, 8, dtype=torch.bfloat16)
    mask = torch.rand(2, 1, 70, 90) > 0.3
    monkeypatch.setattr(records.F, "scaled_dot_product_attention", listening)
    monkeypatch.setattr(records, "SHORT_MS", 0.0)
    (site,) = sparge.explain(
        lambda q, k, mask: dense(q, k, k, mask, scale=0.3, enable_gqa=True), q, k, mask, policy=EXACT
    ).sites
    assert site.rewritten and site.dense_ms > 0 and site.sparse_ms > 0 and len(seen) == 2  # once to warm up
    (query, key, _, given), options = seen[-1]
    assert query.dtype == torch.bfloat16 and key.shape == k.shape and torch.equal(given.expand_as(mask), mask)
    assert {"is_causal": False, **options} == {"is_causal": False, "scale": 0.3, "enable_gqa": True}


@pytest.mark.parametrize(("taken", "counted"), [([4.0, 2.0, 6.0], 2.0), ([21.0], 21.0)], ids=["short", "long"])
def test_of_short_calls_the_best_of_three_counts(monkeypatch, taken, counted):
    monkeypatch.setattr(records, "_wall_clock", lambda call: taken.pop(0))
    assert CallTimer()([lambda: None], [X]) == [counted] and taken == []


def test_each_kind_of_call_is_warmed_up_once(monkeypatch):
    monkeypatch.setattr(records, "SHORT_MS", 0.0)
    timer, runs = CallTimer(), []
    small, large = torch.zeros(2), torch.zeros(3)
    for tensor in (small, small, large, small):
        assert len(timer([lambda: runs.append(0)], [tensor])) == 1
    assert len(runs) == 4 + 2


def test_where_memory_runs_out_a_call_has_no_times():
    def too_large():
        raise torch.OutOfMemoryError("no memory")

    assert CallTimer()([too_large], [X]) is None


@pytest.mark.parametrize("kind", ["full", "causal", "masked", "gqa", "longer-queries"])
def test_tile_maps_are_what_the_kernel_computed(kind):
    torch.manual_seed(0)
    q_len, k_len = {"longer-queries": (700, 330)}.get(kind, (520, 520))
    heads = 2 if kind == "gqa" else 4
    q = torch.randn(2, 4, q_len, 16).cumsum(2) / 6
    k = torch.randn(2, heads, k_len, 16).cumsum(2) / 6
    mask = torch.ones(2, 1, 1, k_len, dtype=torch.bool) if kind == "masked" else None
    if mask is not None:
        mask[..., 64:200] = False  # hides two tiles and cuts one
    is_causal = kind in ("causal", "longer-queries")

    def attend(q, k, mask):
        return F.scaled_dot_product_attention(q, k, k, mask, is_causal=is_causal, enable_gqa=True)

    report = sparge.explain(attend, q, k, mask, policy=SPARSE, timing=False, tile_maps=("*",))
    (site,) = report.rewritten
    if mask is None:
        hidden = causal_tiles(q_len, k_len, is_causal, q.dtype, q.device).hidden.expand(2, 4, -1, -1)
    else:
        hidden = mask_tiles(additive_mask(mask, q.dtype).expand(2, 4, q_len, k_len)).hidden
    maps = torch.stack([torch.stack([report.tile_map("attend", h, b) for h in range(4)]) for b in range(2)])
    assert maps.shape == hidden.shape and maps.dtype == torch.bool and not (maps & hidden).any()
    densities = maps.sum((-2, -1)) / (~hidden).sum((-2, -1))
    assert site.head_densities == pytest.approx(densities.mean(0).tolist()) and 0.1 < site.density < 0.95


def test_tile_maps_are_kept_by_the_name_of_the_site_that_runs():
    model = nn.Sequential(*(Attention() for _ in range(3))).eval()
    report = sparge.explain(model, torch.randn(1, 200, 16), policy=SPARSE, timing=False, tile_maps=("1", "2*"))
    assert sorted(report.tiles) == ["1", "2"] and report.tile_map("2", 1).shape == (2, 4)


def test_a_tile_map_that_is_not_there_says_what_to_do():
    policy = Policy(**{**EXACT_FIELDS, "dense": ("*.1",)})
    report = sparge.explain(Stack(3).eval(), X, policy=policy, timing=False, tile_maps=("blocks.0",))
    with pytest.raises(KeyError, match=r"tile_maps=\('blocks.2',\)"):
        report.tile_map("blocks.2", 0)
    with pytest.raises(KeyError, match=r"stayed dense.*dense pattern"):
        report.tile_map("blocks.1", 0)
    with pytest.raises(KeyError, match=r"did you mean.*blocks.0"):
        report.tile_map("block.0", 0)
    with pytest.raises(ValueError, match=r"head=2.*has 2; 0 to 1 is allowed"):
        report.tile_map("blocks.0", 2)
    with pytest.raises(ValueError, match="batch=-1"):
        report.tile_map("blocks.0", 0, -1)
    with pytest.raises(TypeError, match=r"write tile_maps=\('a',\)"):
        sparge.explain(Stack(1), X, tile_maps="a")
    with pytest.raises(TypeError, match="tile_maps holds 1:"):
        sparge.explain(Stack(1), X, tile_maps=("a", 1))


def test_the_json_holds_everything_and_no_number_that_json_lacks(clock):
    report = sparge.explain(Stack(2).eval(), X, policy=EXACT)
    content = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["speedup"] == 4 and content["sites"][1]["head_densities"] == [1.0, 1.0]
    assert content["sites"][0]["dense_ms"] == 8 and content["diffs"] == list(report.diffs)
    odd = SiteReport("a", rewritten=True, reason=None, density=math.nan, thresholds=({"pv": -math.inf},))
    content = json.loads(Report((odd,)).to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["sites"][0]["density"] is None and content["sites"][0]["thresholds"] == [{"pv": None}]


def test_the_diff_shows_each_rewritten_call_and_nothing_of_explain_itself():
    text = sparge.explain(Stack(2).eval(), X, policy=Policy(**{**EXACT_FIELDS, "dense": ("*.1",)})).diff()
    removed = [line for line in text.splitlines() if line.startswith("-") and "scaled_dot_product" in line]
    added = [line for line in text.splitlines() if line.startswith("+") and "sparge.attention" in line]
    assert len(removed) == len(added) == 1 and "site = 'blocks.0'" in added[0]
    assert sparge.explain(Stack(1).eval(), X, policy=Policy(enabled=False)).diff() == ""
    with pytest.raises(ValueError, match="graph_diff"):
        Report().diff()
