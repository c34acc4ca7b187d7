"""Thresholds as a tensor: the same results as the same numbers in the call, on every kernel, and nothing read back."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import HALF, random_qkv

from sparge_kernels.cpu import KERNEL_VARIABLE
from sparge_kernels.thresholds import NEVER_SKIP, Thresholds, pack

attention = torch.ops.sparge.attention.default
with_stats = torch.ops.sparge.attention_with_stats.default
ENTRIES = [
    Thresholds(0.3, 1.0, -1.0, NEVER_SKIP),
    Thresholds(None, 0.6, -1.0, None),
    Thresholds(1.0, 1.0, 1.0, -2.0),
    HALF,
]


def table(entries: list[Thresholds], **options: object) -> torch.Tensor:
    return torch.tensor(pack(entries), dtype=torch.float64, **options).view(len(entries), 4)


@pytest.mark.parametrize("operator", [attention, with_stats], ids=["plain", "with-stats"])
@pytest.mark.parametrize("entries", [[HALF], ENTRIES], ids=["one-entry", "per-head"])
def test_opcheck(operator, entries):
    q, k, v = random_qkv(70, 90, heads=4, kv_heads=2)
    with torch.no_grad():
        torch.library.opcheck(operator, (q, k, v, None, table(entries)), {"enable_gqa": True})


@pytest.mark.parametrize("kernel", ["native", "blocked", pytest.param("interpreted", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("entries", [[ENTRIES[0]], [ENTRIES[1]], ENTRIES], ids=["topk", "cdf", "per-head"])
def test_a_table_gives_what_the_same_numbers_in_the_call_give(kernel, entries, monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    if kernel == "interpreted" and (
        reason := pytest.importorskip("sparge_kernels.triton").unavailable(torch.device("cpu"))
    ):
        pytest.skip(reason)
    q, k, v = random_qkv(200, 700, heads=4, kv_heads=2, dim=32)
    options = {"enable_gqa": True, "is_causal": False}
    given = with_stats(q, k, v, threshold_table=table(entries), **options)
    constant = with_stats(q, k, v, thresholds=pack(entries), **options)
    for one, other in zip(given, constant, strict=True):
        assert torch.equal(one, other)
    assert given[1].min() < 1


def test_a_changed_table_changes_the_next_call_of_the_same_graph():
    q, k, v = random_qkv(130, 700, heads=2)
    numbers = table([Thresholds(0.2, 1.0, -1.0, None)])
    compiled = torch.compile(lambda *given: attention(*given), fullgraph=True)
    with torch.no_grad():
        sparse = compiled(q, k, v, None, numbers)
        numbers[0, 0] = 1.0
        full = compiled(q, k, v, None, numbers)
    assert torch.equal(full, attention(q, k, v, thresholds=pack([Thresholds(1.0, 1.0, -1.0, None)])))
    assert not torch.equal(full, sparse)


REFUSED = {
    "fp32": (table([HALF]).float(), {}, TypeError, r"float32; torch.float64"),
    "flat": (table([HALF]).flatten(), {}, ValueError, r"shape \[4\]; \[1, 4\]"),
    "three-numbers": (table([HALF])[:, :3], {}, ValueError, r"shape \[1, 3\]"),
    "other-heads": (table([HALF] * 3), {}, ValueError, r"shape \[3, 4\].*\[2, 4\]"),
    "device": (table([HALF], device="meta"), {}, ValueError, "on meta, query on cpu"),
    "both": (table([HALF]), {"thresholds": pack([HALF])}, ValueError, "given together"),
    "out-of-range": (table([HALF]) + 7, {}, ValueError, "out of range"),
    "neither": (None, {}, ValueError, "thresholds has 0 numbers"),
}


@pytest.mark.parametrize("given, options, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_table_is_refused_with_its_reason(given, options, error, message):
    with pytest.raises(error, match=message):
        attention(*random_qkv(8, 8, heads=2), None, given, **options)


def test_the_fake_refuses_what_the_call_refuses():
    q, k, v = (x.to("meta") for x in random_qkv(8, 8, heads=2))
    with pytest.raises(ValueError, match="has shape"):
        attention(q, k, v, None, table([HALF] * 3, device="meta"))
    assert attention(q, k, v, None, table([HALF] * 2, device="meta")).shape == q.shape
