"""Which token belongs to which tile: padding, tile counts, and what causality makes of a pair of tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_kernels.thresholds import K_TILE, Q_TILE


def tile_count(length: int, tile: int) -> int:
    """Number of tiles of `tile` tokens that cover `length` tokens."""
    return -(-length // tile)


def split_tiles(x: Tensor, tile: int, fill: float = 0) -> Tensor:
    """[..., S, D] -> [..., n, tile, D]; the ragged tail is padded with `fill`."""
    length = x.shape[-2]
    n = tile_count(length, tile)
    if n * tile != length:
        x = F.pad(x, (0, 0, 0, n * tile - length), value=fill)
    return x.unflatten(-2, (n, tile))


def tile_lengths(length: int, tile: int, device: torch.device) -> Tensor:
    """Real tokens in each tile, int64 [n]: `tile` everywhere but in a ragged tail."""
    starts = torch.arange(0, length, tile, device=device)
    return (length - starts).clamp(max=tile)


def tile_rows(tiles: Tensor, tile: int, length: int) -> Tensor:
    """The tokens of the tiles with these (ascending) indices, int64 [n]; a ragged tail has fewer."""
    rows = (tiles[:, None] * tile + torch.arange(tile, device=tiles.device)).flatten()
    return rows[rows < length]


def past_tiles(q_len: int, k_len: int, is_causal: bool, device: torch.device) -> Tensor:
    """Bool [nQ, nK]: every query of the tile sees every key of the tile."""
    q_first = torch.arange(0, q_len, Q_TILE, device=device)
    if not is_causal:
        return torch.ones(len(q_first), tile_count(k_len, K_TILE), dtype=torch.bool, device=device)
    k_last = (torch.arange(0, k_len, K_TILE, device=device) + K_TILE - 1).clamp(max=k_len - 1)
    return k_last[None, :] < q_first[:, None]


def diagonal_tiles(q_len: int, k_len: int, is_causal: bool, device: torch.device) -> Tensor:
    """Bool [nQ, nK]: a key of the tile has the position of a query of the tile (causal only)."""
    past = past_tiles(q_len, k_len, is_causal, device)
    if not is_causal:
        return torch.zeros_like(past)
    q_last = (torch.arange(0, q_len, Q_TILE, device=device) + Q_TILE - 1).clamp(max=q_len - 1)
    k_first = torch.arange(0, k_len, K_TILE, device=device)
    return (k_first[None, :] <= q_last[:, None]) & ~past
