"""The GPU kernels against the specification, with all they can tell: output, tiles, skipped products, log-sum-exp.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEFAULT,
    HALF,
    KEEP_ALL,
    LAYOUTS,
    both_causal,
    both_precisions,
    dense,
    every_dtype,
    kernel_error,
    random_qkv,
    relative_l1,
    run_triton,
)
from mask_cases import MASKS
from stages import OUTPUT_ROUNDING
from torch import Tensor
from triton_cases import DEVICE, on_device

from sparge_kernels import reference, triton
from sparge_kernels.thresholds import NEVER_SKIP, Q_TILE, Thresholds
from sparge_kernels.triton import launch
from workloads import smooth_field

pytestmark = pytest.mark.interpreted
SKIPPING = Thresholds(topk=0.8, cdf=1.0, similarity=-1.0, pv=-1.0)


def stages(q: Tensor, k: Tensor, v: Tensor, thresholds: list[Thresholds], **options: object):
    """Output and log-sum-exp, both NaN before the call, density and pv_skipped; and what the reference gives."""
    options = {"attn_mask": None, "is_causal": False, "scale": q.shape[3] ** -0.5, "precision": "int8", **options}
    entries = thresholds * (q.shape[1] if len(thresholds) == 1 else 1)
    expected = reference.attention(q, k, v, thresholds=entries, enable_gqa=True, centring="call", **options)
    q, k, v = map(on_device, (q, k, v))
    options["attn_mask"] = None if options["attn_mask"] is None else on_device(options["attn_mask"])
    output = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype, device=DEVICE)
    lse = torch.full(q.shape[:3], torch.nan, device=DEVICE)
    density, pv_skipped = triton.attention(q, k, v, thresholds=entries, out=output, lse=lse, **options)
    return output.cpu(), lse.cpu(), density.cpu(), pv_skipped.cpu(), expected


def rows_per_program(q: Tensor, v: Tensor, precision: str) -> int:
    arch = launch.architecture(torch.device(DEVICE))
    return launch.attend_config(arch, q.shape[3], v.shape[3], q.element_size(), precision == "int8").rows


def assert_as_specified(q: Tensor, k: Tensor, v: Tensor, thresholds: list[Thresholds], **options: object) -> None:
    output, lse, density, pv_skipped, expected = stages(q, k, v, thresholds, **options)
    assert torch.equal(density, expected.density)
    if rows_per_program(q, v, str(options.get("precision", "int8"))) == Q_TILE:
        torch.testing.assert_close(pv_skipped, expected.pv_skipped)
    else:  # parts of a query tile decide for themselves: what all of it can do without, so can they
        assert (pv_skipped >= expected.pv_skipped - 1e-6).all()
    torch.testing.assert_close(lse, expected.lse.float(), rtol=1e-3, atol=1e-3)
    magnitude = reference.attention(
        q.float(), k.float(), v.float().abs(), thresholds=thresholds, enable_gqa=True, centring="call", **options
    ).output
    error = (output.double() - expected.output.double()).abs()
    precision = options.get("precision", "int8")
    rounding = OUTPUT_ROUNDING[q.dtype] * expected.output.double().abs()
    assert (error <= kernel_error(run_triton, q.dtype, precision) * magnitude + 3 * rounding + 1e-6).all()


@both_causal
@both_precisions
@pytest.mark.parametrize("threshold", [KEEP_ALL, HALF, DEFAULT, SKIPPING], ids=["all", "half", "default", "skipping"])
@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 300), (127, 65), (129, 128), (257, 191), (300, 70)], ids=str)
def test_lengths(is_causal, precision, threshold, q_len, k_len):
    q, k, v = random_qkv(q_len, k_len, heads=2, kv_heads=1, dim=32)
    assert_as_specified(2 * q, k, v, [threshold], is_causal=is_causal, precision=precision)


@every_dtype
@both_precisions
@pytest.mark.parametrize("dim, value_dim", [(1, 1), (16, 16), (40, 24), (64, 128), (96, 96), (128, 64), (256, 256)])
def test_head_dims(dtype, precision, dim, value_dim):
    q, k, v = random_qkv(130, 200, dim=dim, value_dim=value_dim, dtype=dtype)
    assert_as_specified(q, k, v, [HALF], precision=precision, is_causal=True)


@both_causal
def test_structured_inputs_where_tiles_are_dropped_and_products_skipped(is_causal):
    q, k, v = smooth_field((1, 6, 128), heads=1, gain=8.0, offset=0.0, correlation=(0.5, 1.0, 32.0))
    _, _, density, _, _ = stages(q, k, v, [DEFAULT], is_causal=is_causal)
    assert density.max() < 1
    assert_as_specified(q, k, v, [DEFAULT], is_causal=is_causal)
    _, _, _, skipped, _ = stages(q, k, v, [SKIPPING], is_causal=is_causal)
    assert skipped.min() > 0
    assert_as_specified(q, k, v, [SKIPPING], is_causal=is_causal)


@both_precisions
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(precision, mask):
    q, k, v = random_qkv(140, 200, batch=2, heads=2, kv_heads=1)
    assert_as_specified(q, k, v, [SKIPPING, HALF], attn_mask=mask(2, 2, 140, 200), precision=precision)


@both_causal
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scales(is_causal, scale):
    q, k, v = random_qkv(150, 210)
    assert_as_specified(q, k, v, [HALF], is_causal=is_causal, scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_of_inputs_output_and_mask(layout):
    q, k, v = (layout(x) for x in random_qkv(140, 140, heads=3))
    mask = layout(torch.randn(1, 3, 140, 140))
    assert_as_specified(q, k, v, [HALF], is_causal=True)
    assert_as_specified(q, k, v, [HALF], attn_mask=mask)


@settings(deadline=None, max_examples=200 if DEVICE == "cuda" else 12)
@given(
    q_len=st.integers(1, 270),
    k_len=st.integers(1, 270),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (7, 1)]),
    dim=st.integers(1, 70),
    value_dim=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    is_causal=st.booleans(),
    precision=st.sampled_from(["int8", "none"]),
    topk=st.sampled_from([None, 0.1, 0.5, 1.0]),
    similarity=st.sampled_from([-1.0, 0.3, 1.0]),
    pv=st.sampled_from([None, NEVER_SKIP, -3.0]),
    seed=st.integers(0, 1000),
)
def test_any_call(q_len, k_len, heads, dim, value_dim, dtype, is_causal, precision, topk, similarity, pv, seed):
    q, k, v = random_qkv(
        q_len, k_len, heads=heads[0], kv_heads=heads[1], dim=dim, value_dim=value_dim, dtype=dtype, seed=seed
    )
    threshold = Thresholds(topk, 0.9, similarity, pv)
    output, _, density, _, expected = stages(q, k, v, [threshold], is_causal=is_causal, precision=precision)
    if torch.equal(density, expected.density):  # else fp32 rounding chose another tile of equal worth
        assert relative_l1(output, expected.output) < 0.02
    assert (density - expected.density).abs().max() <= 1 / min(expected.kept[0, 0].numel(), 4)
    assert output.isfinite().all()


def test_a_huge_key_moves_the_centre_and_no_output():
    # Its tile and, for all lie far from the mean then, every other one are computed exactly.
    q, k, v = random_qkv(200, 640, dim=64)
    k[:, :, 333] = 1e5
    q[..., 0] = -q[..., 1:].sum(-1)  # no query wants it
    output, *_ = stages(q, k, v, [KEEP_ALL])
    assert relative_l1(output, dense(q, k, v)) < 0.02


def test_the_empty_end_of_a_cache_does_not_blur_the_keys():
    q, k, v = random_qkv(200, 640, dim=64)
    k[..., 5] += 200
    k[:, :, 128:], v[:, :, 128:] = 0, 0
    mask = (torch.arange(640) < 120)[None, None, None]
    output, *_ = stages(q, k, v, [KEEP_ALL], attn_mask=mask)
    assert relative_l1(output, dense(q, k, v, attn_mask=mask)) < 0.02


def test_a_bias_that_turns_with_the_position_costs_no_accuracy():
    q, k, v = random_qkv(640, 640, dim=64)
    k[..., 5] += 200 * torch.linspace(0, 3, 640).cos()
    for is_causal in (False, True):
        output, *_ = stages(q, k, v, [KEEP_ALL], is_causal=is_causal)
        assert relative_l1(output, dense(q, k, v, is_causal)) < 0.03


@pytest.mark.parametrize("q_len", [128, 150, 200])
def test_a_query_tile_shared_by_two_programs(monkeypatch, q_len):
    halves = launch.AttendConfig(warps=8, stages=1, rows=64, chunk=32)
    monkeypatch.setattr(launch, "attend_config", lambda *_: halves)
    q, k, v = random_qkv(q_len, 200, dim=64)
    for options in ({}, {"is_causal": True}, {"precision": "none"}):
        assert_as_specified(q, k, v, [SKIPPING], **options)
    v[:, :, 5, 3], v[:, :, 199, 4] = torch.nan, torch.inf
    for options in ({}, {"is_causal": True}):
        output, _, _, _, expected = stages(q[:, :, : q_len - 100], k, v, [KEEP_ALL], **options)
        assert torch.equal(output.isnan(), expected.output.isnan())
        assert torch.equal(output.isinf(), expected.output.isinf())
    q, k, v = smooth_field((1, 4, 128), heads=1, gain=8.0, offset=0.0, correlation=(0.5, 1.0, 32.0))
    _, _, _, pv_skipped, _ = stages(q[:, :, 60 : 60 + q_len], k, v, [SKIPPING])
    assert 0 < pv_skipped < 1


def test_scores_of_minus_inf_alone_in_the_first_tile_give_no_nan():
    q, k, v = random_qkv(130, 200)
    q[..., 0], k[:, :, :64, 0] = 1e20, -1e20
    output, *_ = stages(q, k, v, [KEEP_ALL], precision="none")
    assert relative_l1(output, dense(q, k, v, dtype=torch.float32)) < 1e-4


def test_values_beyond_the_largest_of_bf16_stay_finite():
    q, k, v = random_qkv(130, 200)
    v[:, :, 7] = torch.finfo(torch.float32).max
    output, *_ = stages(q * 0, k, v / 300, [KEEP_ALL])
    assert relative_l1(output, (v.double() / 300).mean(2, keepdim=True).expand_as(output)) < 0.02
    output, *_ = stages(q, k, v, [KEEP_ALL], is_causal=True)
    assert output.isfinite().all() and relative_l1(output[:, :, :7], dense(q, k, v, True)[:, :, :7]) < 0.02


def test_a_profile_of_many_heads_reaches_each_of_them():
    entries = [Thresholds((h + 1) / 40, 1.0, -1.0, NEVER_SKIP) for h in range(35)]
    q, k, v = random_qkv(1, 700, heads=35, kv_heads=1)
    _, _, density, _, expected = stages(q, k, v, entries)
    assert torch.equal(density, expected.density) and len(density.unique()) > 8
