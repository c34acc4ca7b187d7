"""What the kernels that read Q, K and V tile by tile share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# 1.5 * 2^23: added to |x| < 2^22 it rounds x half to even, and leaves the integer in the low bits of the sum.
_ROUNDING: tl.constexpr = tl.constexpr(12582912.0)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
_UNIT = 8


def strides_in_units(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Strides of x [B, H, S, D], all but the last divided by the unit, and the unit: 8 where it divides them, else 1.

    A product with 8 tells the compiler that rows start at whole vectors; by itself it asks whether 16 divides.
    """
    *outer, last = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    unit = _UNIT if all(stride % _UNIT == 0 for stride in outer) else 1
    return (*(stride // unit for stride in outer), x.stride(3) if last == 0 else last), unit


def broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of a [B or 1, H or 1, M or 1, N or 1] tensor (None: zeros) as if it were expanded."""
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def unit_last_stride(x: Tensor) -> Tensor:
    """x, or a copy of it if neighbours in the last dimension are not neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_strides(*tensors: Tensor) -> tuple[tuple[int, ...], int]:
    """Strides of all dimensions but the last of each, in one unit, and that unit: as strides_in_units."""
    strides = [0 if x.shape[axis] == 1 else x.stride(axis) for x in tensors for axis in range(x.dim() - 1)]
    unit = _UNIT if all(stride % _UNIT == 0 for stride in strides) else 1
    return tuple(stride // unit for stride in strides), unit


@triton.jit
def load_tile(
    pointer, batch, head, batch_stride, head_stride, row_stride,
    dim_stride, rows, dims, length,
    UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Rows of one head as fp32 [rows, dims], 0 beyond the ends; strides as strides_in_units gives them."""
    at = pointer + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * UNIT
    at += rows.to(tl.int64)[:, None] * row_stride * UNIT + dims.to(tl.int64)[None, :] * dim_stride
    inside = (rows < length)[:, None]
    if DIM != PADDED:
        inside = inside & (dims < DIM)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def all_finite(x):
    """No inf and no NaN in x [n]."""
    return tl.sum(x * 0.0, 0) == 0.0


@triton.jit
def int8_scale(largest):
    """Scale of numbers up to `largest`, and whether INT8 cannot hold them: inf, or a scale that lost digits."""
    scale = tl.math.div_rn(largest, 127.0)
    holds = (scale < float("inf")) & ((largest == 0.0) | (scale >= _SMALLEST_NORMAL))
    return scale, holds == 0


@triton.jit
def inverse_or_zero(x, numerator):
    """numerator / x, and 0 for 0."""
    zero = x == 0.0
    return tl.where(zero, 0.0, tl.math.div_rn(numerator, tl.where(zero, 1.0, x)))


@triton.jit
def power_of_two(largest):
    """A power of two s with `largest` / s below 4, at least 1 but for denormals; and 1 / s: both exact."""
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def round_codes(x, inverse):
    """x * inverse, rounded half to even, as int8; x [M, N], inverse [M, 1]."""
    return (x * inverse + _ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
