"""What a measurement is said to mean: gain, noise, no gain, a failed gate, nothing measured; and the break-even."""

from __future__ import annotations

import pytest
import torch

from sparge_compile.bench import verdict
from sparge_compile.bench.problem import smooth_problem
from sparge_compile.bench.rows import Row
from sparge_compile.bench.verdict import Verdict, break_even, judge, left_dense

LEFT = "it has fewer than 1024 tokens (min_tokens)"


def rows(ratio=None, low=None, high=None, note="", trouble=None, rounds=5):
    """Of one size: a dense baseline, and ours at the default thresholds."""
    dense = Row(8192, 64, False, None, "dense bf16", milliseconds=100.0, is_baseline=True)
    ours = Row(8192, 64, False, None, "sparge int8", "default", density=0.41, relative_l1=0.013, worst_cosine=0.9712)
    ours.ratio, ours.ratio_low, ours.ratio_high, ours.rounds = ratio, low, high, rounds
    ours.note, ours.trouble = note, trouble
    return [dense, ours]


def test_a_gain_says_how_much_against_whom_and_at_what_error():
    found = judge(rows(5.9, 5.5, 6.2), "default", None, only_size=True)
    assert found.outcome == "gain" and found.ratio == 5.9
    assert found.words == (
        "At this size: 5.90 times as fast as the fastest dense peer (dense bf16), 5.50 to 6.20 in the middle half of "
        "5 rounds (default thresholds, 41% of the tiles computed, relative L1 0.013, worst row's cosine 0.971)."
    )


def test_a_gain_that_nobody_gets_by_default_says_so():
    found = judge(rows(1.4, 1.2, 1.6), "default", LEFT, only_size=False)
    assert found.words.startswith("At 8192 tokens: 1.40 times")
    assert found.words.endswith(f"But a compiled model leaves such a call dense by default: {LEFT}.")


def test_no_gain_is_said_in_words_and_what_to_do():
    found = judge(rows(0.8, 0.7, 1.0), "default", None, only_size=True)
    assert found.outcome == "no gain" and found.words.startswith("No gain at this size: 0.80 times as fast")
    assert "set min_tokens above this length" in found.words
    found = judge(rows(0.8, 0.7, 0.9), "default", LEFT, only_size=True)
    assert found.words.endswith("A compiled model leaves such a call dense by default.")


@pytest.mark.parametrize("ratio", [0.95, 1.05])
def test_what_lies_within_the_noise_is_no_clear_gain(ratio):
    found = judge(rows(ratio, 0.9, 1.3), "default", None, only_size=True)
    assert "min_tokens" not in found.words
    assert found.outcome == "unclear" and found.words.startswith("No clear gain at this size: ")


@pytest.mark.parametrize(
    ("ratio", "low", "high", "rounds", "outcome", "number"),
    [
        (1.004, 1.003, 1.005, 9, "no gain", "1.00 times"),
        (0.996, 0.995, 0.997, 9, "no gain", "1.00 times"),
        (1.05, 1.02, 1.06, 9, "gain", "1.05 times"),
        (1.02, 1.01, 1.03, 9, "unclear", "1.02 times"),
        (9.996, 9.9, 12.4, 9, "gain", "10 times"),
        (128.4, 120.0, 130.0, 9, "gain", "128 times"),
        (4.0, 4.0, 4.0, 2, "unclear", "4.00 times"),
        (0.5, 0.5, 0.5, 1, "unclear", "0.50 times"),
    ],
    ids=["nearly 1", "a little less", "margin", "below the margin", "ten", "hundred", "two rounds", "one round"],
)
def test_outcome_and_numbers_do_not_contradict_each_other(ratio, low, high, rounds, outcome, number):
    found = judge(rows(ratio, low, high, rounds=rounds), "default", None, only_size=True)
    assert found.outcome == outcome and f" {number} as fast" in found.words
    assert ("too few to tell" in found.words) == (rounds < 3)


@pytest.mark.parametrize(
    ("trouble", "begins"), [("gate failed", "Accuracy gate failed"), ("failed", "Failed")], ids=["gate", "error"]
)
def test_a_kernel_that_is_wrong_and_one_that_dies_are_told_apart(trouble, begins):
    found = judge(rows(note="this is so", trouble=trouble), "default", None, True)
    assert (found.outcome, found.ratio) == (trouble, None)
    assert found.words == f"{begins} at 8192 tokens (sparge int8, default thresholds): this is so. Nothing was timed."


def test_what_was_not_measured_has_a_reason():
    found = judge(rows(note="OutOfMemoryError: no memory", trouble="not measured"), "default", None, True)
    assert found.outcome == "not measured" and "no memory" in found.words
    lonely = rows(2.0, 2.0, 2.0)[1:]
    assert "no dense peer" in judge(lonely, "default", None, True).words


def test_the_inputs_are_at_fault_where_dense_attention_fails_its_check():
    dense = [Row(64, 8, False, None, name, trouble="gate failed", note="it is NaN") for name in ("dense a", "dense b")]
    found = judge(dense, "default", None, True)
    assert found.outcome == "not measured"
    assert "(dense a: it is NaN), so the inputs are at fault: look for inf, NaN" in found.words
    dense[1].trouble = None  # the other passes: it is not the inputs
    assert "at fault" not in judge(dense, "default", None, True).words


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


def test_what_is_said_of_the_defaults_is_true_of_the_dtype(monkeypatch):
    monkeypatch.setattr(verdict.ops, "int8_products", lambda _: "AVX-512 VNNI")
    monkeypatch.setattr(verdict.ops, "unmeasured", lambda _, dtype, __: "X" if dtype == torch.bfloat16 else None)
    words = {
        dtype: verdict.default_minimum(torch.device("cpu"), dtype, "int8") for dtype in (torch.float32, torch.bfloat16)
    }
    assert "1024 tokens or more are rewritten here (a length measured on another CPU)" in words[torch.float32]
    assert words[torch.bfloat16] == "By default calls in bfloat16 stay dense here: X."


def test_what_a_compiled_model_does_by_default_is_asked_of_the_rules(monkeypatch):
    monkeypatch.setattr(verdict.ops, "int8_products", lambda _: "AVX-512 VNNI")
    monkeypatch.setattr(verdict.ops, "unmeasured", lambda *_: "AMX was not measured")
    options = {"is_causal": False, "precision": "int8", "dtype": torch.float32}
    assert left_dense(smooth_problem(1000, 1, 8, **options)) == LEFT
    assert left_dense(smooth_problem(1024, 1, 8, **options)) == "AMX was not measured"
