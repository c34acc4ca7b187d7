"""Reports say who set each site's thresholds, for which lengths, what density to expect, and how often it compiled."""

import pytest
import torch
import torch.nn.functional as F
from light import LightBackend, run
from torch import nn

import sparge_compile as sparge
from sparge_compile import Policy, Profile, dynamo
from sparge_compile.report import Report
from sparge_compile.rules import rule_for
from sparge_kernels.thresholds import Thresholds, pack

X = torch.randn(1, 2, 40, 8)


class Attention(nn.Module):
    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=self.is_causal)


def site_under(policy, is_causal=False):
    """The report of the only site, and its operator node."""
    _, backend = run(Attention(is_causal), X, policy=policy)
    (site,), (node,) = backend.sites, backend.operators()
    return site, node


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_default_names_its_rule_and_uses_its_numbers(is_causal):
    rule = rule_for("auto", is_causal)
    site, node = site_under(Policy(min_tokens=0), is_causal)
    assert site.threshold_source == f"rule {rule.name}" and site.predictor == node.kwargs["predictor"] == "clusters"
    assert list(node.kwargs["thresholds"]) == pack([rule.thresholds])
    assert site.expected_density is None and site.bucket == "0 or more"


def test_the_papers_predictor_brings_the_papers_thresholds():
    site, node = site_under(Policy(min_tokens=0, predictor="sparge"))
    assert site.threshold_source == "rule paper" and site.predictor == node.kwargs["predictor"] == "sparge"
    assert tuple(node.kwargs["thresholds"][1:3]) == (0.98, 0.5)


def test_fields_of_the_policy_are_named_as_such_and_leave_the_rest_to_the_rule():
    site, node = site_under(Policy(min_tokens=0, topk=0.25))
    assert site.threshold_source == "policy" and site.expected_density == 0.25
    assert tuple(node.kwargs["thresholds"][:3]) == (0.25, 0.96, 0.15)
    site, node = site_under(Policy(min_tokens=0, similarity_threshold=-1.0))
    assert site.threshold_source == "policy" and tuple(node.kwargs["thresholds"][1:3]) == (0.96, -1.0)


def test_a_profile_is_named_and_wins_over_the_fields():
    profile = Profile({"Attention": (Thresholds(None, 0.9, 0.2, None),)})
    site, node = site_under(Policy(min_tokens=0, topk=0.25, profile=profile))
    assert site.threshold_source == "profile"
    assert tuple(node.kwargs["thresholds"][:3]) == (0.0, 0.9, 0.2)


def test_the_bucket_says_from_which_length_on_and_where_the_operator_decides():
    assert site_under(Policy(min_tokens=32))[0].bucket == "32 or more"
    x = torch.randn(1, 2, 40, 8)
    torch._dynamo.mark_dynamic(x, 2, min=8, max=512)
    _, backend = run(Attention(), x, policy=Policy(min_tokens=32))
    assert backend.sites[0].bucket == "32 or more, at run time"


def test_recompiles_are_counted_and_said():
    backend = LightBackend(Policy(min_tokens=0))
    compiled = torch.compile(Attention(), backend=backend)
    with torch.no_grad():
        for topk in (0.2, 0.3, 0.4):
            with sparge.rewriting(topk=topk):
                compiled(X)
    assert [site.variant for site in backend.sites] == [1, 2, 3]
    text = str(Report((backend.sites[-1],)))
    assert f"compiled in up to 3 variants (torch keeps {torch._dynamo.config.recompile_limit} of" in text
    assert "compiled" not in str(Report((backend.sites[0],)))


def test_the_table_shows_the_expected_density_until_one_is_measured():
    site, _ = site_under(Policy(min_tokens=0, topk=0.25))
    assert "~0.250" in str(Report((site,)))
    (measured,) = sparge.explain(Attention(), X, policy=Policy(min_tokens=0, topk=0.25)).sites
    assert measured.density is not None and f"{measured.density:.3f}" in str(Report((measured,)))
    assert "~" not in str(Report((measured,)))


@pytest.mark.skipif(not dynamo.ISOLATES, reason="torch 2.11 cannot keep compiles apart; explain's docstring says so")
def test_what_explain_compiles_is_not_counted_as_the_users():
    model = Attention()
    for topk in (0.2, 0.3, 0.4):
        sparge.explain(model, X, policy=Policy(min_tokens=0, topk=topk))
    backend = LightBackend(Policy(min_tokens=0))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(X)
        with sparge.rewriting(topk=0.5):
            compiled(X)
    assert [site.variant for site in backend.sites] == [1, 2]
