"""Every reason for which a call stays dense is known, and comes with what to change."""

import pytest
import torch
from reason_texts import of_page, table, texts

import sparge_compile as sparge
from sparge_compile import Policy, SiteReport
from sparge_compile.reasons import KINDS, kind_of, what_to_change
from sparge_compile.report import Report


def test_every_reason_in_the_code_is_of_a_known_kind():
    assert [text for text in texts() if kind_of(text) is None] == []
    assert len(texts()) > 100


def test_every_kind_is_one_of_the_code():
    used = {kind_of(text) for text in texts()}
    assert [kind.text for kind in KINDS if kind not in used] == []


def test_the_page_has_every_reason_and_no_other():
    assert of_page() == table(), "run python tests/compiler/reason_texts.py --write"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.text[:30])
def test_kinds_say_why_and_what_to_do_in_sentences(kind):
    assert kind.why.endswith(".") and kind.change.endswith(".") and len(kind.label) <= 16


def test_a_reason_that_says_what_to_do_is_not_told_twice():
    assert (
        what_to_change("a gradient is needed here and the kernel has no backward; run it under torch.no_grad()") is None
    )
    assert "min_tokens" in (what_to_change("6 queries and 6 keys, min_tokens is 1024: it does not pay") or "")
    assert what_to_change("something new") is None


def test_the_table_and_the_json_say_what_to_change():
    x = torch.randn(1, 2, 6, 8)
    report = sparge.explain(torch.nn.functional.scaled_dot_product_attention, x, x, x, policy=Policy(min_tokens=9))
    (site,) = report.dense
    assert site.change and site.change in " ".join(str(report).split()) and site.change in report.to_json()
    assert SiteReport("a", rewritten=True, reason=None).change is None


def test_equal_reasons_are_said_once():
    sites = tuple(SiteReport(f"blocks.{i}.attn", rewritten=False, reason="head_dim is not fixed") for i in range(9))
    text = str(Report(sites))
    assert text.count("head_dim is not fixed") == 1 and text.count("blocks.{0-8}.attn x9") == 2
