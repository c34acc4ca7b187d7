"""The default policy on every workload: close to dense, in every row, with every needle, or dense by itself."""

import pytest
import torch
import torch.nn.functional as F

import sparge_compile as sparge
from sparge_compile import Policy
from sparge_compile.rules import RULES, rule_for
from workloads import WORKLOADS

DENSE_BY_THEMSELVES = {"cross, 77 words", "cross, 512 words", "uniform", "uniform, causal"}
SPARSE = {"video, gain 4": 0.92, "language": 0.7, "language, sharp": 0.45, "needles in language": 0.7}
"""Largest density at 4096 tokens of workloads that have something to skip."""


def run(work, policy):
    """Output of the default kernel, dense output (both fp32), density."""
    options = {"is_causal": work.is_causal}
    output, stats = sparge.attention(work.q, work.k, work.v, policy=policy, return_stats=True, **options)
    return output, F.scaled_dot_product_attention(work.q, work.k, work.v, **options), float(stats.density.mean())


@pytest.mark.never_wrong(17, "native-direct")
@pytest.mark.parametrize("tokens", [1536, 4096])
@pytest.mark.parametrize("name", WORKLOADS)
@torch.no_grad()
def test_the_default_keeps_every_row_and_every_needle(name, tokens):
    work = WORKLOADS[name](tokens)
    output, dense, density = run(work, Policy(strict=True))
    relative_l1 = float((output - dense).abs().sum() / dense.abs().sum())
    worst = float(F.cosine_similarity(output, dense, dim=-1).min())
    assert relative_l1 <= 0.05 and worst >= 0.95, f"relative L1 {relative_l1:.4f}, worst row {worst:.4f}"
    for needle in work.needles:
        found = output[0, needle.head, needle.query] - dense[0, needle.head, needle.query]
        assert found.abs().mean() < 0.05 * dense[0, needle.head, needle.query].abs().mean(), needle
    if name in DENSE_BY_THEMSELVES:
        assert density > 0.99
    if name in SPARSE and tokens == 4096:
        assert density < SPARSE[name]


@torch.no_grad()
def test_the_papers_predictor_loses_needles_that_the_default_finds():
    """What the default is for; if this fails the workload has become too easy."""
    work = WORKLOADS["needles in smooth"](4096)
    output, dense, _ = run(work, Policy(strict=True, predictor="sparge"))
    errors = [(output - dense)[0, n.head, n.query].abs().mean() for n in work.needles]
    sizes = [dense[0, n.head, n.query].abs().mean() for n in work.needles]
    assert sum(error > 0.5 * size for error, size in zip(errors, sizes, strict=True)) >= 1


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("predictor", ["auto", "clusters", "sparge"])
def test_every_call_has_a_rule_of_the_predictor_asked_for(predictor, is_causal):
    rule = rule_for(predictor, is_causal)
    assert rule.predictor == ("clusters" if predictor == "auto" else predictor)
    assert rule.is_causal in (None, is_causal)


def test_rules_have_names_of_their_own():
    assert len({rule.name for rule in RULES}) == len(RULES)
