"""The self-test passes what is right, every time, and nothing that is wrong in any way a user would not see."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from sparge_compile.command import self_test
from sparge_compile.command.self_test import CPU
from sparge_kernels import ops
from sparge_kernels.cpu import KERNEL_VARIABLE, native

needs_native = pytest.mark.skipif(os.name == "nt", reason="nothing is built on Windows")


def test_every_answer_is_right_by_the_reference():
    cases = self_test.cases_of("reference")
    found = self_test.check("reference", self_test.by_reference, CPU, cases)
    assert found.level == "ok" and found.value.startswith(f"right in {len(cases)} cases")


@needs_native
def test_the_native_kernel_is_right_in_all_cases(monkeypatch):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    found = self_test.check("native", self_test.by_operator, CPU, self_test.cases_of("native"))
    assert found.level == "ok" and found.value.startswith(f"right in {len(self_test.CASES)} cases")


@needs_native
def test_compiled_calls_are_right_a_second_time_too():
    for _ in range(2):
        found = self_test.check(self_test.COMPILE, self_test.by_compile, CPU, self_test.COMPILED)
        assert found.level == "ok", found.value


def of_other_heads(x):
    """Keys or values such that query head h of four reads kv head h % 2, where it should read h // 2."""
    return x if x.shape[1] == 1 else x[:, [0, 1, 0, 1]]


def is_causal_mask(mask):
    return bool(mask.dtype != torch.bool and mask.isneginf().any())


# q, k, v and the options as the kernel gets them -> those that the broken one takes instead; None: it gives zeros.
def scale_is_ignored(q, k, v, options):
    return q, k, v, {**options, "scale": q.shape[-1] ** -0.5}


def a_mask_is_dropped(which):
    def change(q, k, v, options):
        mask = options["attn_mask"]
        dropped = mask is not None and which(mask)
        return q, k, v, {**options, "attn_mask": None if dropped else mask}

    return change


def mask_of_the_first(dimension):
    def change(q, k, v, options):
        mask = options["attn_mask"]
        return q, k, v, {**options, "attn_mask": None if mask is None else mask.narrow(dimension, 0, 1)}

    return change


def heads_are_mixed_up(q, k, v, options):
    if q.shape[1] == k.shape[1]:
        return q, k, v, options
    return q, of_other_heads(k), of_other_heads(v), options


def zeros_where(holds):
    return lambda q, k, v, options: None if holds(q, k) else (q, k, v, options)


def the_last_row_is_another(q, k, v, options):
    return torch.cat((q[:, :, :-1], -q[:, :, -1:]), 2), k, v, options


def causal_from_the_end(q, k, v, options):
    if not options["is_causal"] or q.shape[2] == k.shape[2]:
        return q, k, v, options
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return q, k, v, {**options, "is_causal": False, "attn_mask": seen.expand(1, 1, -1, -1)}


def strides_are_ignored(q, k, v, options):
    return *(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()) for x in (q, k, v)), options


def thresholds(**fields):
    def change(q, k, v, options):
        greedy = [
            one if one.topk else replace(one, **{name: f(getattr(one, name)) for name, f in fields.items()})
            for one in options["thresholds"]
        ]
        return q, k, v, {**options, "thresholds": greedy}

    return change


BROKEN = {
    "the last row is another query's": the_last_row_is_another,
    "the scale is ignored": scale_is_ignored,
    "a float mask is dropped": a_mask_is_dropped(lambda mask: mask.dtype != torch.bool),
    "a bool mask is dropped": a_mask_is_dropped(lambda mask: mask.dtype == torch.bool),
    "a causal float mask is dropped": a_mask_is_dropped(is_causal_mask),
    "a float mask that is not causal is dropped": a_mask_is_dropped(
        lambda mask: mask.dtype != torch.bool and not is_causal_mask(mask)
    ),
    "the mask of head 0 is used for all": mask_of_the_first(1),
    "the mask of the first entry is used for all": mask_of_the_first(0),
    "query heads read other kv heads": heads_are_mixed_up,
    "fp16 is wrong": zeros_where(lambda q, k: q.dtype == torch.float16),
    "bf16 is wrong": zeros_where(lambda q, k: q.dtype == torch.bfloat16),
    "a batch is wrong": zeros_where(lambda q, k: q.shape[0] > 1),
    "fewer queries than keys are wrong": zeros_where(lambda q, k: q.shape[2] < k.shape[2]),
    "more queries than keys are wrong": zeros_where(lambda q, k: q.shape[2] > k.shape[2]),
    "causal is aligned at the end": causal_from_the_end,
    "large heads are wrong": zeros_where(lambda q, k: q.shape[3] >= 64),
    "larger heads are wrong": zeros_where(lambda q, k: q.shape[3] >= 128),
    "many keys are wrong": zeros_where(lambda q, k: k.shape[2] > 1024),
    "strides are ignored": strides_are_ignored,
    "stage 1 is too greedy": thresholds(cdf=lambda cdf: 0.9 * cdf),
    "stage 1 is a little too greedy": thresholds(cdf=lambda cdf: 0.98 * cdf),
    "stage 1 is too timid": thresholds(cdf=lambda cdf: cdf**0.5),
    "stage 1 asks for no similarity": thresholds(similarity=lambda _: -1.0),
    "stage 2 is too greedy": thresholds(pv=lambda _: -0.5),
}


@pytest.fixture
def break_kernel(monkeypatch):
    sound = native.attention

    def install(change):
        def broken(q, k, v, *, out, **options):
            changed = change(q, k, v, options)
            if changed is None:
                out.zero_()
                return torch.ones(q.shape[:2]), torch.zeros(q.shape[:2])
            *tensors, options = changed
            return sound(*tensors, out=out, **options)

        monkeypatch.setattr(native, "attention", broken)

    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    return install


@needs_native
@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_kernel_that_is_wrong_in_one_way_is_a_problem(break_kernel, change):
    break_kernel(change)
    found = self_test.check("native", self_test.by_operator, CPU, self_test.cases_of("native"))
    assert found.level == "problem" and ": WRONG " in found.value
    assert "do not use this backend here" in found.advice


@needs_native
@pytest.mark.parametrize("name", ["the scale is ignored", "a float mask is dropped", "query heads read other kv heads"])
def test_a_compiled_call_that_is_wrong_in_one_way_is_a_problem(break_kernel, name):
    break_kernel(BROKEN[name])
    found = self_test.check(self_test.COMPILE, self_test.by_compile, CPU, self_test.COMPILED)
    assert found.level == "problem" and ": WRONG " in found.value
    assert found.advice.startswith("do not use this backend here")


@needs_native
def test_a_compiled_call_that_runs_dense_all_the_same_is_a_problem(monkeypatch):
    monkeypatch.setattr(ops, "record_stats", lambda: nullcontext([]))  # nothing is recorded
    found = self_test.check(self_test.COMPILE, self_test.by_compile, CPU, self_test.COMPILED)
    assert found.level == "problem" and "one call of the kernel is expected" in found.value
