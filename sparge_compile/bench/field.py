"""Queries and keys with the structure of video tokens: random tensors have nothing to predict.

A smooth random field over frames x height x width, read row by row, as Q and K of a video transformer are. The
defaults give a self-similarity of about .86 for tiles of Q and .75 for tiles of centred K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_field(
    grid: tuple[int, int, int] = (2, 16, 128),
    *,
    heads: int = 2,
    head_dim: int = 32,
    correlation: tuple[float, float, float] = (1.0, 3.0, 32.0),
    gain: float = 3.0,
    noise: float = 0.2,
    offset: float = 0.5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v fp32 [1, heads, frames * height * width, head_dim].

    K is the field, Q the field plus a common `offset`, each with white noise of its own; V is another field.
    Scores q . k / sqrt(head_dim) lie within about gain^2 nats of 0. `correlation` is in tokens along each axis.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def field() -> Tensor:
        x = torch.randn(heads * head_dim, *grid, generator=generator, device=device)
        for axis, length in enumerate(correlation, start=1):
            x = blur(x, axis, length)
        # Contiguous, as projections give them: over head_dim-major inputs dense SDPA is several times slower.
        x = x.reshape(heads, head_dim, -1).transpose(1, 2).contiguous()
        return F.normalize(x, dim=-1)

    def white() -> Tensor:
        return noise * torch.randn(heads, tokens, head_dim, generator=generator, device=device) / head_dim**0.5

    tokens = grid[0] * grid[1] * grid[2]
    base = field()
    common = offset * F.normalize(torch.randn(heads, 1, head_dim, generator=generator, device=device), dim=-1)
    amplitude = gain * head_dim**0.25
    q = (base + common + white()) * amplitude
    k = (base + white()) * amplitude
    v = field() * head_dim**0.5
    return q[None], k[None], v[None]


def blur(x: Tensor, axis: int, length: float) -> Tensor:
    """Periodic Gaussian blur along one axis by FFT; `length` is its standard deviation in tokens."""
    frequencies = torch.fft.fftfreq(x.shape[axis], device=x.device)
    window = (-2 * (torch.pi * length * frequencies).square()).exp()
    shape = [1] * x.dim()
    shape[axis] = -1
    return torch.fft.ifft(torch.fft.fft(x, dim=axis) * window.reshape(shape), dim=axis).real
