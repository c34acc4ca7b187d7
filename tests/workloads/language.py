"""A causal field with what attention maps of language models show: a sink, a local band, slashes, and topics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.video import rotate


def language_field(
    tokens: int,
    *,
    heads: int = 2,
    head_dim: int = 64,
    section: int = 384,
    topic_gain: float = 2.4,
    position_gain: float = 2.2,
    sink_gain: float = 9.0,
    noise: float = 0.5,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v fp32 [1, heads, tokens, head_dim], for is_causal=True.

    The channels are in two halves. One holds the topic: a direction that changes every `section` tokens on average
    and comes back later, plus white noise. The other a constant under rotary embedding: a band along the diagonal, and
    slashes at the distances where the slow rotations meet again. Token 0 is a sink of `sink_gain` nats.
    """
    generator = torch.Generator().manual_seed(seed)
    half = head_dim // 2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    changes = torch.rand(tokens, generator=generator) < 1 / section
    topic = torch.randint(24, (tokens,), generator=generator)[changes.cumsum(0)]
    directions = F.normalize(randn(heads, 24, half), dim=-1)[:, topic]  # [heads, tokens, half]

    def content() -> Tensor:
        return (directions + noise * F.normalize(randn(heads, tokens, half), dim=-1)) * topic_gain * head_dim**0.25

    def position() -> Tensor:
        constant = F.normalize(torch.ones(heads, 1, half), dim=-1).expand(-1, tokens, -1)
        jitter = 0.2 * F.normalize(randn(heads, tokens, half), dim=-1)
        return rotate(constant + jitter, (tokens,), base=2000.0) * position_gain * head_dim**0.25

    q, k = (torch.cat([content(), position()], dim=-1) for _ in range(2))
    v = directions.repeat(1, 1, 2) + 0.5 * F.normalize(randn(heads, tokens, head_dim), dim=-1)
    toward = F.normalize(q.mean(1), dim=-1)
    q = q + toward[:, None] * 2.0
    k[:, 0] = toward * sink_gain * head_dim**0.5 / (q * toward[:, None]).sum(-1).mean(-1, keepdim=True)
    v[:, 0] *= 0.1
    return tuple((x * size)[None].contiguous() for x, size in ((q, 1.0), (k, 1.0), (v, head_dim**0.5)))
