"""Models and inputs to calibrate, small enough to do it often."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparge_compile import Policy
from sparge_compile.bench.field import smooth_field

POLICY = Policy(min_tokens=0)
QUIET = {"policy": POLICY, "progress": False}


class Attends(nn.Module):
    """Attention over q, k and v as they are given; `inner` is the site."""

    def __init__(self, **arguments):
        super().__init__()
        self.inner = Sdpa(arguments)

    def forward(self, q, k, v):
        return self.inner(q, k, v)


class Sdpa(nn.Module):
    def __init__(self, arguments):
        super().__init__()
        self.arguments = arguments

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.arguments)


def structured_and_random(tokens=1024, batch=1):
    """Head 0 has nothing to predict, head 1 is a smooth field; [batch, 2, tokens, 32]."""
    fields = [smooth_field((1, tokens // 128, 128), seed=seed, heads=1) for seed in range(batch)]
    smooth = [torch.cat(parts) for parts in zip(*fields, strict=True)]
    return tuple(torch.cat([torch.randn_like(x), x], dim=1) for x in smooth)
