"""Types of numbers on the way of the scores: what overflows, rounds or loses its range is not taken for a cast."""

import math

import pytest
import torch
from light import is_rewritten, qkv, stays_dense

S = 12
OPEN = torch.ones(S, S, dtype=torch.bool).tril().index_fill(0, torch.tensor([3]), False)
LOWEST = torch.finfo(torch.float32).min
ROUNDED = {"rtol": 2e-2, "atol": 2e-2, "equal_nan": True}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def in_eight_bits(q, k, v):
    return (q @ k.mT * 0.3).to(torch.float8_e4m3fn).float().softmax(-1) @ v


def weights_in_eight_bits(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1).to(torch.float8_e5m2).to(v.dtype) @ v


def through_fp16(q, k, v):
    return (q @ k.mT * 0.3).half().float().softmax(-1) @ v


def fp16_softmax_in_fp32(q, k, v):
    return (q @ k.mT * 0.3).half().softmax(-1, dtype=torch.float32) @ v


def through_fp16_by_promotion(q, k, v):
    return (((q @ k.mT).half() * torch.full((1,), 0.3)).softmax(-1)) @ v


def bits_of_another_type(q, k, v):
    return (q @ k.mT).view(torch.float16).softmax(-1).to(v.dtype) @ v


FP32 = {
    "eight-bits": (in_eight_bits, "the scores go through to"),
    "weights-in-eight-bits": (weights_in_eight_bits, "the attention weights go through to"),
    "fp16-in-between": (through_fp16, "converted to fp16"),
    "fp16-before-the-softmax": (fp16_softmax_in_fp32, "converted to fp16"),
    "fp16-and-promoted": (through_fp16_by_promotion, "converted to fp16"),
}


@pytest.mark.parametrize(("attention", "reason"), FP32.values(), ids=FP32.keys())
def test_a_conversion_that_loses_range_stays_dense(attention, reason):
    q, k, v = qkv()
    stays_dense(attention, q * 100, k * 100, v, reason=reason)


def test_bits_read_as_another_type_are_no_view_of_the_scores():
    stays_dense(bits_of_another_type, *qkv(dtype=torch.bfloat16), reason="the scores go through view")


def test_scores_rounded_to_bf16_on_their_way_are_scores():
    is_rewritten(lambda q, k, v: (q @ k.mT).bfloat16().float().softmax(-1) @ v, *qkv(), tolerance=ROUNDED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fill", [-1e9, LOWEST, -math.inf], ids=str)
def test_rows_with_nothing_open_are_nan_where_the_fill_is_infinite_in_the_type_of_the_scores(dtype, fill):
    def attention(q, k, v):
        return torch.where(OPEN, q @ k.mT / 3, fill).softmax(-1) @ v

    is_rewritten(attention, *qkv(dtype=dtype), tolerance=ROUNDED)


def test_fills_are_one_number_if_they_are_once_they_are_rounded():
    def attention(q, k, v):
        scores = (q @ k.mT / 3).masked_fill(OPEN.mT, -math.inf)
        return torch.where(OPEN, scores, -1e9).softmax(-1) @ v

    is_rewritten(attention, *qkv(dtype=torch.float16), tolerance=ROUNDED)


A, B = torch.linspace(-20, 20, S * S).view(S, S), torch.linspace(7, -9, S)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_that_are_summed_in_a_wider_type_stay_dense(dtype):
    def attention(q, k, v, a, b):
        return ((q @ k.mT).float() + a + b).softmax(-1).to(v.dtype) @ v

    stays_dense(attention, *qkv(dtype=dtype), A.to(dtype), B.to(dtype), reason="several masks are added")


def test_one_mask_or_several_in_the_type_of_the_output_are_given_to_the_kernel():
    def one(q, k, v, a):
        return ((q @ k.mT).float() + a).softmax(-1).to(v.dtype) @ v

    def several(q, k, v, a, b):
        return ((q @ k.mT) + a + b).softmax(-1) @ v

    is_rewritten(one, *qkv(dtype=torch.bfloat16), A.bfloat16(), tolerance=ROUNDED)
    is_rewritten(several, *qkv(), A, B)


@pytest.mark.parametrize("scale", [1e4, -60.0, torch.tensor(1e4)], ids=["large", "negative", "tensor"])
def test_a_fill_that_large_scores_reach_stays_dense(scale):
    def attention(q, k, v):
        return (q @ k.mT * scale).masked_fill(~OPEN, -1e4).softmax(-1) @ v

    reason = "the scale is not a constant" if isinstance(scale, torch.Tensor) else "may leave them weight with scale"
    stays_dense(attention, *qkv(), reason=reason)


@pytest.mark.parametrize(("scale", "fill"), [(0.3, -1e4), (1e4, -1e9), (1e4, -math.inf)])
def test_a_fill_that_no_score_reaches_hides(scale, fill):
    def attention(q, k, v):
        return (q @ k.mT * scale).masked_fill(~OPEN, fill).softmax(-1) @ v

    is_rewritten(attention, *qkv(), tolerance={**ROUNDED, "rtol": 1e-3})
