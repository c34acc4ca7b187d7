"""A mask as it is given, made what every kernel takes; and the rows to which it leaves nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EMPTY_ROWS = ("zero", "nan", "mean")
"""What a query gives that may attend to nothing: zeros, as SDPA does, NaN, or the mean of the values of all keys."""


def attending(attn_mask: Tensor, hides: bool) -> Tensor:
    """The mask with True as "attend"; what it repeats has size 1."""
    mask = attn_mask[tuple(slice(1) if stride == 0 else slice(None) for stride in attn_mask.stride())]
    return mask.logical_not() if hides else mask


def fill_empty_rows(output: Tensor, value: Tensor, mask: Tensor, fill: str) -> None:
    """Writes what `fill` says to the rows of `output` [B, Hq, Sq, Dv] that a mask of `attending` leaves nothing.

    Until then they hold zeros or, of inputs that are not finite, NaN.
    """
    if fill == "zero" or output.numel() == 0 or value.shape[2] == 0:
        return
    if output.device.type == "cpu" and bool((output.abs().amax(3) > 0).all()):
        return  # a look at the output instead of one at the whole mask, whose keys may lie apart
    # Of bytes the largest is found many times faster than `any` of booleans.
    empty = mask.view(torch.uint8).amax(3) == 0 if mask.dtype == torch.bool else mask.amax(3) == -math.inf
    if fill == "nan":
        output.masked_fill_(empty[..., None], math.nan)
        return
    mean = value.mean(2, keepdim=True).repeat_interleave(output.shape[1] // value.shape[1], 1)
    output.copy_(torch.where(empty[..., None], mean, output))
