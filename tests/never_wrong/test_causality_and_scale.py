"""Ways to be silently wrong 3 and 4: the scale is the caller's; causal is top-left and looks at nothing later."""

import pytest
import torch
from arms import dense, every_arm, item
from kernel_cases import DEFAULT, HALF, KEEP_ALL, both_causal, both_precisions, every_dtype, random_qkv, relative_l1

from workloads import smooth_field

INF, NAN = float("inf"), float("nan")


@item(3)
@every_arm
@both_causal
@both_precisions
@pytest.mark.parametrize("scale", [None, 0.0, -0.3, 1.0], ids=lambda scale: f"scale-{scale}")
def test_the_scale_is_the_callers(arm, is_causal, precision, scale):
    q, k, v = random_qkv(150, 210)
    result = arm(q, k, v, KEEP_ALL, is_causal=is_causal, scale=scale, precision=precision)
    assert relative_l1(result.output, dense(q, k, v, is_causal, scale)) < 0.02


@item(3)
@every_arm
@both_precisions
@pytest.mark.parametrize("dim", [1, 3, 40, 72, 96])
def test_the_default_scale_is_that_of_the_head_dim_given_not_of_the_padded_one(arm, precision, dim):
    q, k, v = random_qkv(150, 130, dim=dim, value_dim=16)
    q = 4 * q
    output = arm(q, k, v, precision=precision).output
    assert relative_l1(output, dense(q, k, v)) < 0.02
    padded = dense(q, k, v, scale=2 ** -((dim - 1).bit_length() / 2))
    assert dim == 1 or relative_l1(output, padded) > 0.02, "the test could not tell"


@item(3)
@every_arm
@both_causal
def test_the_prediction_uses_the_scale_too(arm, is_causal):
    q, k, v = smooth_field((1, 6, 128), heads=1, gain=8.0, offset=0.0, correlation=(0.5, 1.0, 32.0))
    sharp, flat = (arm(q, k, v, DEFAULT, is_causal=is_causal, scale=scale).density for scale in (None, 1e-4))
    assert sharp.max() < 1 and flat.min() > sharp.max()


@item(4)
@every_arm
@every_dtype
@both_precisions
@pytest.mark.parametrize("position", [0, 64, 100, 255, 256, 300])
@pytest.mark.parametrize("intruder", [1e4, NAN, -INF], ids=["large", "nan", "minus-inf"])
def test_a_future_key_or_value_changes_no_bit_of_an_earlier_output(arm, dtype, precision, position, intruder):
    q, k, v = (x.to(dtype) for x in smooth_field((1, 3, 128), heads=1))
    for thresholds in (DEFAULT,) if arm.is_slow else (DEFAULT, HALF):
        before = arm(q, k, v, thresholds, is_causal=True, precision=precision).output
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, position:, ::3] = intruder
        later_v[:, :, position:, 1::2] = intruder
        after = arm(q, later_k, later_v, thresholds, is_causal=True, precision=precision).output
        assert torch.equal(before[:, :, :position], after[:, :, :position])
        assert not torch.equal(before[:, :, position:], after[:, :, position:])


@item(4)
@every_arm
@both_precisions
@pytest.mark.parametrize("q_len, k_len", [(1, 9), (7, 12), (12, 7), (130, 65), (65, 130), (1, 300), (300, 1)], ids=str)
def test_causal_is_top_left_for_more_keys_than_queries_and_for_fewer(arm, precision, q_len, k_len):
    q, k, v = random_qkv(q_len, k_len)
    output = arm(q, k, v, is_causal=True, precision=precision).output
    assert relative_l1(output, dense(q, k, v, is_causal=True)) < 0.02
    assert (output[:, :, 0] - v[:, :, 0]).abs().max() < 0.02 * v.abs().max()  # the first query sees the first key


@item(4)
@every_arm
def test_keys_that_lie_after_every_query_in_a_cache_are_never_met(arm):
    q, k, v = random_qkv(70, 400)
    k[:, :, 70:], v[:, :, 70:] = NAN, NAN
    output = arm(q, k, v, is_causal=True).output
    assert relative_l1(output, dense(q, k[:, :, :70], v[:, :, :70], is_causal=True)) < 0.02
