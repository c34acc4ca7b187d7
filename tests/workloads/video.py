"""Video tokens as a diffusion transformer sees them: a smooth field, rotated by position, with what breaks prediction.

Frames x height x width tokens read row by row. Beside the field, any of: a sink key that all queries like, text tokens
in front that resemble nothing, and a large constant bias on a few key channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.bench.field import blur


def video_field(
    grid: tuple[int, int, int],
    *,
    heads: int = 2,
    head_dim: int = 64,
    correlation: tuple[float, float, float] = (6.0, 12.0, 12.0),
    gain: float = 2.0,
    noise: float = 0.3,
    text: int = 0,
    sink: bool = False,
    key_bias: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v fp32 [1, heads, text + frames * height * width, head_dim].

    Q and K are one field of unit norm with white noise of their own (`noise` of the norm), Q with a common offset;
    then 3-D rotary embedding and an amplitude that puts q . k / sqrt(head_dim) within about gain^2 nats of 0.
    key_bias: size of a constant added to three channels of all keys, times the amplitude.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(grid)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def field(scale: float = 1.0) -> Tensor:
        x = randn(heads * head_dim, *grid)
        for axis, length in enumerate(correlation, start=1):
            x = blur(x, axis, length * scale)
        return F.normalize(x.reshape(heads, head_dim, tokens).transpose(1, 2), dim=-1)

    def white() -> Tensor:
        return noise * F.normalize(randn(heads, tokens, head_dim), dim=-1)

    base = field()
    offset = 0.5 * F.normalize(randn(heads, 1, head_dim), dim=-1)
    q, k = (rotate(x, grid) for x in (base + offset + white(), base + white()))
    amplitude = gain * head_dim**0.25
    q, k, v = q * amplitude, k * amplitude, field(0.25) * head_dim**0.5
    if sink:
        k[:, 0] = amplitude * 1.5 * F.normalize(q.mean(1), dim=-1)
    if key_bias:
        k[..., :3] += key_bias * amplitude
    if text:
        words = [F.normalize(randn(heads, text, head_dim), dim=-1) * size for size in (amplitude, amplitude, 1)]
        words[2] = words[2] * head_dim**0.5
        q, k, v = (torch.cat([word, x], dim=1) for word, x in zip(words, (q, k, v), strict=True))
    return q[None].contiguous(), k[None].contiguous(), v[None].contiguous()


def rotate(x: Tensor, grid: tuple[int, ...], base: float = 100.0) -> Tensor:
    """Rotary embedding over the axes of `grid`, an equal share of the channel pairs each; x [..., tokens, dim]."""
    pairs = x.shape[-1] // 2
    share = pairs // len(grid)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid)).reshape(-1, len(grid))
    frequencies = base ** -(torch.arange(share) / share)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # [tokens, len(grid) * share]
    angles = F.pad(angles, (0, pairs - angles.shape[1]))
    first, second = x[..., :pairs], x[..., pairs:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
