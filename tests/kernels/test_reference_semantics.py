"""What a user may rely on, for the specification and every kernel alike: never-wrong behaviours."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEFAULT,
    HALF,
    KEEP_ALL,
    LAYOUTS,
    both_causal,
    both_precisions,
    dense,
    every_dtype,
    every_kernel,
    kernel_error,
    random_qkv,
    relative_l1,
)

from sparge_kernels.thresholds import Thresholds
from workloads import smooth_field

INF, NAN = float("inf"), float("nan")


@every_kernel
@every_dtype
@both_precisions
@pytest.mark.parametrize("position", [0, 64, 100, 255, 256, 300])
@pytest.mark.parametrize("intruder", [1e4, NAN, -INF], ids=["large", "nan", "minus-inf"])
def test_a_future_key_or_value_changes_no_bit_of_an_earlier_output(kernel, dtype, precision, position, intruder):
    q, k, v = (x.to(dtype) for x in smooth_field((1, 3, 128), heads=2))
    for thresholds in ([DEFAULT], [HALF]):
        before = kernel(q, k, v, thresholds, is_causal=True, precision=precision).output
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, position:, ::3] = intruder
        later_v[:, :, position:, 1::2] = intruder
        after = kernel(q, later_k, later_v, thresholds, is_causal=True, precision=precision).output
        assert torch.equal(before[:, :, :position], after[:, :, :position])
        assert not torch.equal(before[:, :, position:], after[:, :, position:])


@every_kernel
@both_causal
@pytest.mark.parametrize("length", [1, 50, 63, 65, 129, 200])
def test_what_lies_beyond_the_ragged_end_is_never_read(kernel, is_causal, length):
    plain = random_qkv(length, length)
    padded = [torch.full((*x.shape[:2], 512, x.shape[3]), NAN) for x in plain]
    for x, store in zip(plain, padded, strict=True):
        store[:, :, :length] = x
    views = [store[:, :, :length] for store in padded]
    expected = kernel(*plain, [DEFAULT], is_causal=is_causal)
    result = kernel(*views, [DEFAULT], is_causal=is_causal)
    torch.testing.assert_close(result.output, expected.output)
    assert torch.equal(result.density, expected.density)


def _spoil_key(q, k, v):
    k[:, :, 70, 3] = INF


def _spoil_key_nan(q, k, v):
    k[:, 0, 70, 3] = NAN


def _spoil_value(q, k, v):
    v[:, :, 10, 3], v[:, :, 100, 4], v[:, :, 100, 3], v[:, :, 20, 5] = INF, -INF, -INF, NAN


def _spoil_query(q, k, v):
    q[:, :, 5, 0], q[:, :, 6, 1], q[:, :, 7, 2] = NAN, INF, -INF


def _all_scores_minus_inf(q, k, v):
    k.abs_()
    q[:, :, 8] = -INF


def _overflow_tile_sum(q, k, v):
    k[:, :, 64:] *= 1e37
    q *= 1e-37


@every_kernel
@both_causal
@both_precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [_spoil_key, _spoil_key_nan, _spoil_value, _spoil_query, _all_scores_minus_inf, _overflow_tile_sum],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_nan_and_inf_appear_exactly_where_visible_sdpa_has_them(kernel, spoil, is_causal, precision, dtype):
    q, k, v = random_qkv(150, 150, dtype=dtype)
    spoil(q, k, v)
    result = kernel(q, k, v, [Thresholds(0.01, 1.0, -1.0, None)], is_causal=is_causal, precision=precision)
    expected = _dense_over_visible_keys(q, k, v) if is_causal else dense(q, k, v)
    assert torch.equal(result.output.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(result.output[infinite].double(), expected[infinite])
    if spoil is _all_scores_minus_inf:
        assert (result.output[:, :, 8] == 0).all()


def _dense_over_visible_keys(q, k, v):
    """Causal SDPA row by row: a masked NaN value must not be multiplied by 0 into the row."""
    rows = [dense(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(q.shape[2])]
    return torch.cat(rows, dim=2)


@every_kernel
@both_precisions
def test_a_non_finite_query_row_disturbs_no_other_row(kernel, precision):
    q, k, v = random_qkv(200, 200)
    before = kernel(q, k, v, [KEEP_ALL], precision=precision).output
    q[:, :, 70] = NAN
    q[:, :, 71, 0] = INF
    after = kernel(q, k, v, [KEEP_ALL], precision=precision).output
    others = [i for i in range(200) if i not in (70, 71)]
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert after[:, :, 70].isnan().all()


@every_kernel
def test_zero_rows_and_zero_tensors_give_no_nan(kernel):
    q, k, v = random_qkv(200, 200)
    q[:, :, :130], k[:, :, 60:140] = 0, 0
    result = kernel(q, k, v, [DEFAULT])
    assert relative_l1(result.output, dense(q, k, v)) < 0.02
    result = kernel(q * 0, k * 0, v, [DEFAULT])
    error = (result.output - v.mean(2, keepdim=True)).abs()
    assert (error <= kernel_error(kernel, v.dtype) * v.abs().mean(2, keepdim=True)).all()


@every_kernel
@both_causal
def test_bf16_values_up_to_1e5_stay_finite_and_right(kernel, is_causal):
    q, k, v = random_qkv(200, 200, dtype=torch.bfloat16)
    v = v * 1e5
    result = kernel(q, k, v, [KEEP_ALL], is_causal=is_causal)
    assert result.output.dtype == torch.bfloat16
    assert relative_l1(result.output, dense(q, k, v, is_causal)) < 0.02


@every_kernel
@both_causal
def test_a_huge_bias_on_a_key_channel_costs_no_accuracy(kernel, is_causal):
    q, k, v = random_qkv(300, 300)
    k[..., 2] += 300
    result = kernel(q, k, v, [KEEP_ALL], is_causal=is_causal)
    assert relative_l1(result.output, dense(q, k, v, is_causal)) < 0.02


@every_kernel
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-30], ids=str)
def test_denormal_keys_meet_large_queries_correctly(kernel, size):
    q, k, v = random_qkv(70, 70)
    q, k = q / size**0.5 / size**0.5 if size > 1e-38 else q * 1e37, k * size
    result = kernel(q, k, v, [KEEP_ALL])
    assert relative_l1(result.output, dense(q, k, v)) < 0.02


@every_kernel
@both_causal
@both_precisions
@pytest.mark.parametrize("scale", [None, 0.0, -0.3, 1.0], ids=lambda scale: f"scale-{scale}")
def test_the_scale_is_the_callers(kernel, is_causal, precision, scale):
    q, k, v = random_qkv(150, 210)
    result = kernel(q, k, v, [KEEP_ALL], is_causal=is_causal, scale=scale, precision=precision)
    assert relative_l1(result.output, dense(q, k, v, is_causal, scale)) < 0.02


@every_kernel
@both_causal
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_same_result_and_inputs_stay_as_they_were(kernel, is_causal, layout):
    views = [layout(x) for x in random_qkv(140, 140, heads=3)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    result = kernel(*views, [HALF], is_causal=is_causal)
    expected = kernel(*copies, [HALF], is_causal=is_causal)
    torch.testing.assert_close(result.output, expected.output)
    assert torch.equal(result.density, expected.density)
    assert all(torch.equal(x, y) for x, y in zip(views, copies, strict=True))
    storages = {x.untyped_storage().data_ptr() for x in views}
    assert result.output.untyped_storage().data_ptr() not in storages


@every_kernel
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (6, 2), (8, 2), (7, 1), (3, 3)])
def test_query_head_h_reads_kv_head_h_over_group_with_its_own_thresholds(kernel, heads, kv_heads):
    q, k, v = random_qkv(200, 260, heads=heads, kv_heads=kv_heads, batch=2)
    thresholds = [Thresholds((h + 1) / heads, 1.0, -1.0, None) for h in range(heads)]
    together = kernel(q, k, v, thresholds)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        alone = kernel(q[:, h, None], k[:, kv, None], v[:, kv, None], [thresholds[h]])
        torch.testing.assert_close(together.output[:, h, None], alone.output)
        assert torch.equal(together.density[:, h, None], alone.density)


@every_kernel
@both_causal
@pytest.mark.parametrize("target", [20, 250, 299], ids=["first-tile", "middle", "ragged-tail"])
def test_a_needle_seen_by_one_query_is_found_under_default_thresholds(kernel, is_causal, target):
    q, k, v = smooth_field((1, 3, 100), heads=1)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q[:, :, 299], k[:, :, target] = 12 * direction, 12 * direction
    v[:, :, target] = 5.0
    result = kernel(q, k, v, [DEFAULT], is_causal=is_causal)
    assert (result.output[:, :, 299] - 5.0).abs().max() < 0.1


@every_kernel
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0, 1000.0])
def test_one_outlier_key_does_not_cost_its_tile_its_digits(kernel, size):
    q, k, v = (torch.randn(1, 1, 256, 64) for _ in range(3))
    q[..., 0] = 0  # no query looks at the channel
    k[..., 0] = 0
    k[:, :, ::64, 0] = size
    result = kernel(q, k, v, [KEEP_ALL], precision="int8")
    expected = dense(q, k, v)
    assert (result.output - expected).abs().sum() / expected.abs().sum() < 0.03
