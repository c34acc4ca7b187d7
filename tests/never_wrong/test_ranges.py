"""Ways to be silently wrong 6, 8 and 17: ragged ends, numbers at the end of their range, a needle in a smooth tile."""

import pytest
import torch
from arms import dense, every_arm, item
from kernel_cases import (
    DEFAULT,
    KEEP_ALL,
    both_causal,
    both_precisions,
    every_dtype,
    random_qkv,
    relative_l1,
)

from sparge_kernels.thresholds import Thresholds
from workloads import smooth_field

INF, NAN = float("inf"), float("nan")


@item(6)
@every_arm
@both_causal
@pytest.mark.parametrize("length", [1, 50, 63, 65, 129, 200])
def test_what_lies_beyond_the_ragged_end_is_never_read(arm, is_causal, length):
    plain = random_qkv(length, length)
    padded = [torch.full((*x.shape[:2], 512, x.shape[3]), NAN) for x in plain]
    for x, store in zip(plain, padded, strict=True):
        store[:, :, :length] = x
    views = [store[:, :, :length] for store in padded]
    expected = arm(*plain, DEFAULT, is_causal=is_causal)
    result = arm(*views, DEFAULT, is_causal=is_causal)
    torch.testing.assert_close(result.output, expected.output)
    assert torch.equal(result.density, expected.density)


EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257)


@item(6)
@every_arm
@both_causal
@pytest.mark.parametrize("q_len, k_len", [*zip(EDGES, reversed(EDGES), strict=True), *zip(EDGES, EDGES, strict=True)])
def test_every_row_is_right_at_every_edge_of_a_tile(arm, is_causal, q_len, k_len):
    q, k, v = random_qkv(q_len, k_len)
    result = arm(q, k, v, KEEP_ALL, is_causal=is_causal)
    expected = dense(q, k, v, is_causal)
    magnitude = dense(q, k, v.abs(), is_causal)
    error = (result.output - expected).abs().sum(-1) / magnitude.sum(-1)
    assert error.max() < 0.03, f"row {int(error.argmax())}"


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


@item(8)
@every_arm
@both_causal
@both_precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [_spoil_key, _spoil_key_nan, _spoil_value, _spoil_query, _all_scores_minus_inf, _overflow_tile_sum],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_nan_and_inf_appear_exactly_where_visible_sdpa_has_them(arm, spoil, is_causal, precision, dtype):
    q, k, v = random_qkv(150, 150, dtype=dtype)
    spoil(q, k, v)
    result = arm(q, k, v, Thresholds(0.01, 1.0, -1.0, None), is_causal=is_causal, precision=precision)
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


@item(8)
@every_arm
@both_precisions
def test_a_non_finite_query_row_disturbs_no_other_row(arm, precision):
    q, k, v = random_qkv(200, 200)
    before = arm(q, k, v, KEEP_ALL, precision=precision).output
    q[:, :, 70] = NAN
    q[:, :, 71, 0] = INF
    after = arm(q, k, v, KEEP_ALL, precision=precision).output
    others = [i for i in range(200) if i not in (70, 71)]
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert after[:, :, 70].isnan().all()


@item(8)
@every_arm
def test_zero_rows_and_zero_tensors_give_no_nan(arm):
    q, k, v = random_qkv(200, 200)
    q[:, :, :130], k[:, :, 60:140] = 0, 0
    result = arm(q, k, v, DEFAULT)
    assert relative_l1(result.output, dense(q, k, v)) < 0.02
    result = arm(q * 0, k * 0, v, DEFAULT)
    error = (result.output - v.mean(2, keepdim=True)).abs()
    assert (error <= arm.error(v.dtype) * v.abs().mean(2, keepdim=True)).all()


@item(8)
@every_arm
@every_dtype
@both_causal
def test_the_output_has_the_dtype_of_the_inputs_and_16_bits_are_summed_in_fp32(arm, dtype, is_causal):
    q, k, v = random_qkv(200, 700, dtype=dtype)
    v = 1 + v / 64
    result = arm(q, k, v, KEEP_ALL, is_causal=is_causal)
    assert result.output.dtype == dtype
    assert relative_l1(result.output, dense(q, k, v, is_causal)) < 0.005 + arm.error(dtype)


@item(8)
@every_arm
@both_causal
def test_bf16_values_up_to_1e5_stay_finite_and_right(arm, is_causal):
    q, k, v = random_qkv(200, 200, dtype=torch.bfloat16)
    v = v * 1e5
    result = arm(q, k, v, KEEP_ALL, is_causal=is_causal)
    assert result.output.dtype == torch.bfloat16
    assert relative_l1(result.output, dense(q, k, v, is_causal)) < 0.02


@item(8)
@every_arm
@both_causal
def test_a_huge_bias_on_a_key_channel_costs_no_accuracy(arm, is_causal):
    q, k, v = random_qkv(300, 300)
    k[..., 2] += 300
    result = arm(q, k, v, KEEP_ALL, is_causal=is_causal)
    assert relative_l1(result.output, dense(q, k, v, is_causal)) < 0.02


@item(8)
@every_arm
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-30], ids=str)
def test_denormal_keys_meet_large_queries_correctly(arm, size):
    q, k, v = random_qkv(70, 70)
    q, k = q / size**0.5 / size**0.5 if size > 1e-38 else q * 1e37, k * size
    result = arm(q, k, v, KEEP_ALL)
    assert relative_l1(result.output, dense(q, k, v)) < 0.02


@item(8)
@every_arm
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0, 1000.0])
def test_one_outlier_key_does_not_cost_its_tile_its_digits(arm, size):
    q, k, v = (torch.randn(1, 1, 256, 64) for _ in range(3))
    q[..., 0] = 0  # no query looks at the channel
    k[..., 0] = 0
    k[:, :, ::64, 0] = size
    result = arm(q, k, v, KEEP_ALL, precision="int8")
    expected = dense(q, k, v)
    assert (result.output - expected).abs().sum() / expected.abs().sum() < 0.03


@item(17)
@every_arm
@both_causal
@pytest.mark.parametrize("target", [20, 250, 299], ids=["first-tile", "middle", "ragged-tail"])
def test_a_needle_seen_by_one_query_is_found_under_default_thresholds(arm, is_causal, target):
    q, k, v = smooth_field((1, 3, 100), heads=1)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q[:, :, 299], k[:, :, target] = 12 * direction, 12 * direction
    v[:, :, target] = 5.0
    result = arm(q, k, v, DEFAULT, is_causal=is_causal)
    assert (result.output[:, :, 299] - 5.0).abs().max() < 0.1
