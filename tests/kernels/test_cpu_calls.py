"""What a call to a CPU kernel touches: all of its output, none of its inputs, bounded memory, offsets beyond 2^31."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from kernel_cases import (
    DEFAULT,
    HALF,
    KEEP_ALL,
    LAYOUTS,
    both_causal,
    both_precisions,
    cpu_kernels,
    random_qkv,
    run_native,
)
from mask_cases import MASKS
from stages import native_stages
from torch import Tensor

from sparge_kernels.cpu import native

FAR = 2**31  # elements


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN."""
    for name in ("empty", "empty_permuted"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _new=allocate, **kwargs: _new(*args, **kwargs).fill_(torch.nan))


@cpu_kernels
@both_causal
@both_precisions
@pytest.mark.parametrize("q_len, k_len", [(1, 1), (127, 64), (129, 65), (300, 70), (70, 300)])
def test_no_row_is_left_unwritten(poisoned, kernel, is_causal, precision, q_len, k_len):
    tensors = random_qkv(q_len, k_len, heads=3, batch=2, value_dim=13)
    result = kernel(*tensors, [HALF], is_causal=is_causal, precision=precision)
    for part in (result.output, result.density, result.pv_skipped):
        assert part.isfinite().all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_no_row_is_left_unwritten_under_a_mask(poisoned, mask):
    result = run_native(*random_qkv(130, 200, heads=3, batch=2), [HALF], attn_mask=mask(2, 3, 130, 200))
    for part in (result.output, result.density, result.pv_skipped):
        assert part.isfinite().all()


@cpu_kernels
@pytest.mark.parametrize("layout", [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [2, 0, 3, 1]], ids=str)
def test_every_output_layout_holds_the_same_numbers(kernel, layout):
    q, k, v = random_qkv(140, 150, heads=3, batch=2)
    output = kernel(q, k, v, [HALF], layout=layout).output
    assert output.permute(layout).is_contiguous()
    assert torch.equal(output, kernel(q, k, v, [HALF]).output)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_layout_changes_no_bit_and_the_call_none_of_its_inputs(layout, mask):
    views = [*(layout(x) for x in random_qkv(140, 140, heads=3, batch=2)), mask(2, 3, 140, 140)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    result = run_native(*views[:3], [HALF], attn_mask=views[3])
    expected = run_native(*copies[:3], [HALF], attn_mask=copies[3])
    for actual, same in zip(
        (result.output, result.density, result.pv_skipped, *views),
        (expected.output, expected.density, expected.pv_skipped, *copies),
        strict=True,
    ):
        assert torch.equal(actual, same)
    storages = {x.untyped_storage().data_ptr() for x in views}
    assert result.output.untyped_storage().data_ptr() not in storages


def test_a_lazily_negated_view_is_read_with_its_sign():
    negated = torch.view_as_complex(torch.randn(1, 2, 150, 16, 2)).conj().imag
    assert negated.is_neg()
    expected = run_native(*[negated.resolve_neg()] * 3, [HALF]).output
    assert torch.equal(run_native(*[negated] * 3, [HALF]).output, expected)


def far_view(x: Tensor, base: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
    view = base.as_strided(x.shape, strides, offset)
    return view.copy_(x)


@pytest.mark.parametrize(
    "strides, offset",
    [((0, 64, 16, 1), FAR + 5), ((0, FAR + 7, 16, 1), 3), ((0, 16, FAR // 3 + 11, 1), 3), ((0, 128, 32, FAR // 15), 0)],
    ids=["storage-offset", "head-stride", "token-stride", "channel-stride"],
)
@pytest.mark.parametrize("which", ["query", "key", "value", "output", "mask"])
def test_offsets_beyond_two_to_the_31_elements(which, strides, offset):
    q, k, v = random_qkv(4, 4, dtype=torch.bfloat16)
    mask = torch.randn(1, 2, 4, 16).bfloat16()[..., ::4]
    tensors = {"query": q, "key": k, "value": v, "mask": mask}
    expected = native_stages(q, k, v, [DEFAULT], attn_mask=mask).output
    try:
        base = torch.empty(FAR + FAR // 2, dtype=torch.bfloat16)  # 6 GiB of addresses; pages exist where written
    except RuntimeError:
        pytest.skip("the system gives no 6 GiB of addresses")
    output = torch.empty_like(q)
    if which == "output":
        output = far_view(output, base, strides, offset)
    else:
        tensors[which] = far_view(tensors[which], base, strides, offset)
    options = {"is_causal": False, "scale": 0.25, "precision": "int8", "attn_mask": tensors["mask"]}
    native.attention(*list(tensors.values())[:3], thresholds=[DEFAULT] * 2, out=output, **options)
    assert torch.equal(output, expected)


PEAK = """
import re, sys, torch
from pathlib import Path
from sparge_kernels import ops
from sparge_kernels.thresholds import Thresholds, pack
torch.set_num_threads(1)
def peak():  # ru_maxrss would begin with that of the process this one was forked from
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
def run(q_len, k_len, kind):
    q, k = torch.randn(1, 1, q_len, 16), torch.randn(1, 1, k_len, 16)
    ones = torch.ones(q_len + 2 * k_len, dtype=torch.bool)
    apart = ones.as_strided((1, 1, q_len, k_len), (0, 0, 1, 2))
    mask = {"none": None, "mask": ones[None, None, None, :k_len], "mask-keys-apart": apart}[kind]
    torch.ops.sparge.attention.default(q, k, k, mask, thresholds=pack([Thresholds(0.02, 1.0, -1.0, None)]))
run(256, 256, "none")
before = peak()
run(32768, 32768, sys.argv[1])
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    "kernel, mask, limit",
    [("blocked", "none", 600), ("native", "none", 50), ("native", "mask", 50), ("native", "mask-keys-apart", 150)],
)
def test_32k_tokens_allocate_no_score_matrix(monkeypatch, kernel, mask, limit):
    # A 32k x 32k score matrix takes 4096 MiB in fp32, 1024 MiB even as int8.
    monkeypatch.setenv("SPARGE_CPU_KERNEL", kernel)
    run = subprocess.run([sys.executable, "-c", PEAK, mask], capture_output=True, text=True, check=True)
    assert float(run.stdout) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_at_the_largest_number_stay_finite(dtype):
    q, k, _ = random_qkv(200, 200, dtype=dtype)
    v = torch.full((1, 2, 200, 16), torch.finfo(dtype).max, dtype=dtype)
    v[..., 8:] *= -1
    torch.testing.assert_close(run_native(q, k, v, [KEEP_ALL]).output, v, rtol=1e-2, atol=0)


def test_flushing_of_small_numbers_in_some_threads_changes_nothing():
    q, k, v = random_qkv(700, 300, dtype=torch.float16)
    v = v.abs() * 2e-5  # half of them subnormal in fp16
    before = run_native(q, k, v, [KEEP_ALL], precision="none").output
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_flush_denormal(True)
        for _ in range(4):
            assert torch.equal(run_native(q, k, v, [KEEP_ALL], precision="none").output, before)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert (before > 0).all()


def test_a_v_full_of_nan_is_not_slow():
    q, k, v = random_qkv(1024, 1024, heads=1, dim=64)
    poisoned = torch.full_like(v, torch.nan)

    def seconds(values):
        start = time.perf_counter()
        run_native(q, k, values, [KEEP_ALL])
        return time.perf_counter() - start

    ratios = [seconds(poisoned) / seconds(v) for _ in range(5)]
    assert min(ratios) < 10, "seen: about 4; one number at a time it took 30"
