"""What a measurement is said to mean: gain, noise, no gain, a failed gate, nothing measured; and the break-even."""

from __future__ import annotations

import pytest
import torch

from sparge_compile.bench import verdict
from sparge_compile.bench.problem import smooth_problem
from sparge_compile.bench.rows import BASELINE, Row
from sparge_compile.bench.verdict import Verdict, break_even, judge, left_dense

LEFT = "it has fewer than 1024 tokens (min_tokens)"


def rows(ratio=None, low=None, high=None, note="", failed=False):
    """Of one size: a dense baseline, and ours at the default thresholds."""
    dense = Row(8192, 64, False, None, "dense bf16", milliseconds=100.0, note=BASELINE)
    ours = Row(8192, 64, False, None, "sparge int8", "default", density=0.41, relative_l1=0.013, worst_cosine=0.9712)
    ours.ratio, ours.ratio_low, ours.ratio_high, ours.rounds = ratio, low, high, 5
    ours.note, ours.failed = note, failed
    return [dense, ours]


def test_a_gain_says_how_much_against_whom_and_at_what_error():
    found = judge(rows(5.9, 5.5, 6.2), "default", None, only_size=True)
    assert found.outcome == "gain" and found.ratio == 5.9
    assert found.words == (
        "At this size: 5.9 times as fast as the fastest dense peer (dense bf16), 5.5 to 6.2 in the middle half of "
        "5 rounds (default thresholds, 41% of the tiles computed, relative L1 0.013, worst row's cosine 0.971)."
    )


def test_a_gain_that_nobody_gets_by_default_says_so():
    found = judge(rows(1.4, 1.2, 1.6), "default", LEFT, only_size=False)
    assert found.words.startswith("At 8192 tokens: 1.4 times")
    assert found.words.endswith(f"But a compiled model leaves such a call dense by default: {LEFT}.")


def test_no_gain_is_said_in_words_and_what_to_do():
    found = judge(rows(0.8, 0.7, 1.0), "default", None, only_size=True)
    assert found.outcome == "no gain" and found.words.startswith("No gain at this size: 0.8 times as fast")
    assert "set min_tokens above this length" in found.words
    found = judge(rows(0.8, 0.7, 0.9), "default", LEFT, only_size=True)
    assert found.words.endswith("A compiled model leaves such a call dense by default.")


@pytest.mark.parametrize("ratio", [0.95, 1.05])
def test_what_lies_within_the_noise_is_no_clear_gain(ratio):
    found = judge(rows(ratio, 0.9, 1.3), "default", None, only_size=True)
    assert "min_tokens" not in found.words
    assert found.outcome == "unclear" and found.words.startswith("No clear gain at this size: ")


def test_a_failed_gate_is_what_is_said():
    found = judge(
        rows(note="failed: relative L1 to dense fp32 is 0.3, allowed is 0.05", failed=True), "default", None, True
    )
    assert (found.outcome, found.ratio) == ("gate failed", None)
    assert found.words == (
        "Accuracy gate failed at 8192 tokens (sparge int8): relative L1 to dense fp32 is 0.3, allowed is 0.05. "
        "Nothing was timed."
    )


def test_what_was_not_measured_has_a_reason():
    found = judge(rows(note="not measured (OutOfMemoryError: no memory)"), "default", None, True)
    assert found.outcome == "not measured" and "no memory" in found.words
    lonely = rows(2.0, 2.0, 2.0)[1:]
    assert "no dense peer" in judge(lonely, "default", None, True).words


def series(**outcomes):
    return [
        Verdict(int(name[1:]), outcome, "", None if outcome == "gate failed" else 1.0)
        for name, outcome in outcomes.items()
    ]


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        ({"n2048": "gain", "n1024": "no gain"}, "between 1024 and 2048 tokens"),
        ({"n1024": "gain", "n2048": "gain"}, "at or below 1024 tokens, the shortest measured"),
        ({"n1024": "gain", "n2048": "unclear"}, "not reached, 2048 tokens is the longest measured"),
        ({"n1024": "no gain", "n2048": "gate failed", "n4096": "gain"}, "between 1024 and 4096 tokens"),
    ],
    ids=["between", "below", "above", "gap"],
)
def test_the_break_even_lies_between_measured_lengths(outcomes, words):
    assert break_even(series(**outcomes)) == f"Break-even: {words}."


def test_no_break_even_without_times():
    assert break_even(series(n1024="gate failed")) == ""


def test_what_a_compiled_model_does_by_default_is_asked_of_the_rules(monkeypatch):
    monkeypatch.setattr(verdict.ops, "has_int8_products", lambda _: True)
    monkeypatch.setattr(verdict.ops, "unmeasured", lambda *_: "AMX was not measured")
    options = {"is_causal": False, "precision": "int8", "dtype": torch.float32}
    assert left_dense(smooth_problem(1000, 1, 8, **options)) == LEFT
    assert left_dense(smooth_problem(1024, 1, 8, **options)) == "AMX was not measured"
