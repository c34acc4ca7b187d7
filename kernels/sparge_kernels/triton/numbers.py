"""Thresholds on the device, written call by call by a kernel that takes them as arguments.

So nothing is copied from the host, and no tensor outlives its call: a kept one could lie in the pool of a CUDA graph.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.thresholds import FIELDS, Thresholds, pack
from sparge_kernels.triton import launch

_HEADS_A_LAUNCH = 16


def thresholds_on(device: torch.device, thresholds: Sequence[Thresholds] | Tensor, heads: int) -> Tensor:
    """fp64 [heads, 4] on the device, as thresholds.pack gives them.

    thresholds: one entry per query head, or a table that is on the device: fp64 [1 or heads, 4].
    """
    if isinstance(thresholds, Tensor):
        return thresholds.expand(heads, FIELDS).contiguous()
    out = torch.empty(heads, FIELDS, dtype=torch.float64, device=device)
    shared = all(entry == thresholds[0] for entry in thresholds)
    step = 1 if shared else _HEADS_A_LAUNCH
    for first in range(0, 1 if shared else heads, step):
        values = pack(thresholds[first : first + step])
        high = tuple(_fp32(value) for value in values)  # a kernel's numbers are fp32: two of them are exact enough
        low = tuple(_fp32(value - part) for value, part in zip(values, high, strict=True))
        grid = (heads if shared else 1,)
        launch.run(write_numbers_kernel, grid, out[first:], high, low, COUNT=len(values), num_warps=1)
    return out


def _fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@triton.jit
def write_numbers_kernel(out_ptr, high, low, COUNT: tl.constexpr):
    """high + low, COUNT numbers, to place after place; grid (places,)."""
    at = out_ptr + tl.program_id(0) * COUNT
    for n in tl.static_range(COUNT):
        tl.store(at + n, tl.full((), high[n], tl.float64) + tl.full((), low[n], tl.float64))
