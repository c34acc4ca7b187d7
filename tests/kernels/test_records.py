"""What `record_stats` keeps of a call on request: the tiles each kernel chose, and times."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import random_qkv

from sparge_kernels import ops, records
from sparge_kernels.cpu import KERNEL_VARIABLE, KERNELS
from sparge_kernels.masks import additive_mask, causal_tiles, mask_tiles
from sparge_kernels.thresholds import Thresholds, pack

THRESHOLDS = pack([Thresholds(None, 0.9, 0.1, None)])


def recorded(q, k, v, mask=None, **options):
    with ops.record_stats(lambda site: site == "wanted") as kept:
        torch.ops.sparge.attention(q, k, v, mask, thresholds=THRESHOLDS, enable_gqa=True, **options)
    return kept[0]


CASES = [
    pytest.param(kernel, kind, marks=pytest.mark.interpreted if kernel == "interpreted" else ())
    for kernel in KERNELS
    for kind in ("full", "causal", "masked")
    if (kernel, kind) != ("blocked", "masked")  # the kernel in plain torch takes no masks
]


@pytest.mark.parametrize(("kernel", "kind"), CASES)
def test_the_tiles_are_those_that_the_kernel_counts(kernel, kind, monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    torch.manual_seed(0)
    q = torch.randn(1, 2, 270, 16).cumsum(2) / 4
    k, v = torch.randn(1, 1, 400, 16).cumsum(2) / 4, torch.randn(1, 1, 400, 16)
    mask = torch.arange(400)[None, None, None] > 150 if kind == "masked" else None
    record = recorded(q, k, v, mask, is_causal=kind == "causal", site="wanted")
    if mask is None:
        hidden = causal_tiles(270, 400, kind == "causal", q.dtype, q.device).hidden.expand(1, 2, 3, 7)
    else:
        hidden = mask_tiles(additive_mask(mask, q.dtype).expand(1, 2, 270, 400)).hidden
    assert record.tiles.shape == (1, 2, 3, 7) and record.tiles.dtype == torch.bool and not (record.tiles & hidden).any()
    torch.testing.assert_close(record.tiles.sum((-2, -1)) / (~hidden).sum((-2, -1)), record.density)
    assert record.density.min() < 1


def test_tiles_are_kept_of_the_sites_that_were_asked_for_and_of_sparse_calls_only():
    q, k, v = random_qkv(300, 300)
    assert recorded(q, k, v, site="other").tiles is None
    assert recorded(q, k, v, site="wanted", min_tokens=1000).tiles is None
    assert recorded(q, k, v, site="wanted").tiles is not None


def test_the_times_of_a_call_are_no_calls_of_their_own():
    q, k, v = random_qkv(300, 300)
    with ops.record_stats(timer=ops.CallTimer()) as kept:
        torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS, site="sparse")
        torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS, site="dense", min_tokens=1000)
        expected = torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS)
    sparse, dense, _ = kept
    assert sparse.dense_ms > 0 and sparse.sparse_ms > 0 and dense.dense_ms > 0 and dense.sparse_ms is None
    assert torch.equal(torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS), expected)


def test_ambient_autocast_does_not_change_what_is_timed(monkeypatch):
    dtypes = []

    def listening(query, *args, **kwargs):
        dtypes.append(F.linear(query, query[0, 0]).dtype)

    monkeypatch.setattr(records.F, "scaled_dot_product_attention", listening)
    q, k, v = random_qkv(150, 150)
    with torch.autocast("cpu", dtype=torch.bfloat16), ops.record_stats(timer=ops.CallTimer()):
        torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS)
    assert set(dtypes) == {torch.float32}


ERRORS = {
    "GPU": (torch.OutOfMemoryError("CUDA out of memory."), True),
    "CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
    "kernel": (MemoryError("no memory for its buffers"), True),
    "another": (RuntimeError("The size of tensor a must match"), False),
}


@pytest.mark.parametrize(("error", "is_memory"), ERRORS.values(), ids=ERRORS.keys())
def test_a_dense_call_without_memory_has_no_time_and_ends_nothing(error, is_memory, monkeypatch):
    def dense(*args, **kwargs):
        raise error

    monkeypatch.setattr(records.F, "scaled_dot_product_attention", dense)
    q, k, v = random_qkv(150, 150)
    outcome = contextlib.nullcontext() if is_memory else pytest.raises(RuntimeError, match="must match")
    with ops.record_stats(timer=ops.CallTimer()) as kept, outcome:
        torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS)
    assert [(record.dense_ms, record.sparse_ms) for record in kept] == [(None, None)] * is_memory


@pytest.mark.parametrize("shape", [(0, 2, 64, 16), (1, 0, 64, 16), (1, 2, 0, 16)], ids=["batch", "heads", "tokens"])
def test_empty_calls_are_not_timed(shape):
    with ops.record_stats(timer=ops.CallTimer()) as kept:
        torch.ops.sparge.attention(*[torch.randn(shape)] * 3, thresholds=THRESHOLDS)
    assert [(record.ran, record.dense_ms) for record in kept] == [("dense", None)]


class Event:
    """Of a GPU on which the time of each event is the number of calls so far, squared."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.made += 1
        self.time = float(Event.made**2)

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.time - self.time


def test_on_a_gpu_each_call_is_between_two_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Event, "made", 0)
    assert records._on_gpu([lambda: None, lambda: None], torch.device("cuda")) == [3.0, 5.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_on_a_gpu_are_positive():
    q, k, v = (x.cuda().half() for x in random_qkv(1024, 1024))
    with ops.record_stats(timer=ops.CallTimer()) as kept:
        torch.ops.sparge.attention(q, k, v, thresholds=THRESHOLDS)
    assert kept[0].dense_ms > 0 and kept[0].sparse_ms > 0
