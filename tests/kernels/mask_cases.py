"""Masks of every meaning, dtype, broadcast and memory layout; tiles of a mask one by one; SDPA with a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparge_kernels.thresholds import K_TILE, Q_TILE

MaskBuilder = Callable[[int, int, int, int], Tensor]
"""(batch, heads, q_len, k_len) to a mask that broadcasts to [batch, heads, q_len, k_len]."""


def tiles_of(mask: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Every pair of tiles of a mask [..., Sq, Sk] with its indices."""
    for i, rows in enumerate(mask.split(Q_TILE, dim=-2)):
        for j, tile in enumerate(rows.split(K_TILE, dim=-1)):
            yield i, j, tile


def distances(q_len: int, k_len: int) -> Tensor:
    """Position of the query minus position of the key, int [1, 1, Sq, Sk]."""
    return (torch.arange(q_len)[:, None] - torch.arange(k_len))[None, None]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _coin(*shape: int) -> Tensor:
    return _random(*shape) > 0


def documents(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    """Documents of 50, 70, 90 ... tokens: no edge of one lies on the edge of a tile."""
    ends = torch.tensor([50, 120, 210, 320, 450, 600, 770, 960])
    q_document = torch.bucketize(torch.arange(q_len), ends, right=True)
    k_document = torch.bucketize(torch.arange(k_len), ends, right=True)
    return (q_document[:, None] == k_document)[None, None]


def _padding(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    lengths = k_len - 30 * torch.arange(batch)[:, None]
    return (torch.arange(k_len) < lengths.clamp(min=1))[:, None, None, :]


def _alibi(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    return -distances(q_len, k_len).abs() * slopes[None, :, None, None]


def _fully_masked_rows(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    mask = _coin(batch, 1, q_len, k_len)
    mask[:, :, 1::3] = False
    return mask


def _transposed(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    return _random(batch, heads, k_len, q_len).transpose(2, 3)


def _heads_innermost(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    """As a table of biases per head gives it: every tile lies among those of the other heads."""
    return _random(q_len, k_len, heads).permute(2, 0, 1)[None]


def _sliced(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    return _coin(batch, heads, q_len + 2, 2 * k_len + 3)[:, :, 1:-1, 2:-1:2]


BOOL_MASKS: dict[str, MaskBuilder] = {
    "queries-by-keys": lambda b, h, q, k: _coin(1, 1, q, k),
    "per-batch-keys": lambda b, h, q, k: _coin(b, 1, 1, k),
    "per-head-queries": lambda b, h, q, k: _coin(1, h, q, 1),
    "of-everything": lambda b, h, q, k: _coin(b, h, q, k),
    "one-for-all": lambda b, h, q, k: torch.ones(1, 1, 1, 1, dtype=torch.bool),
    "expanded": lambda b, h, q, k: _coin(1, 1, q, k).expand(b, h, q, k),
    "sliced": _sliced,
    "causal": lambda b, h, q, k: distances(q, k) >= 0,
    "sliding-window": lambda b, h, q, k: distances(q, k).abs() < 80,
    "padding": _padding,
    "documents": documents,
    "fully-masked-rows": _fully_masked_rows,
    "batch-innermost": lambda b, h, q, k: _coin(k, q, h, b).permute(3, 2, 1, 0),
}

FLOAT_MASKS: dict[str, MaskBuilder] = {
    "bias": lambda b, h, q, k: _random(1, h, q, k),
    "steep-bias": lambda b, h, q, k: 10 * _random(b, 1, q, k),
    "bias-of-keys": lambda b, h, q, k: _random(b, 1, 1, k),
    "bias-of-queries": lambda b, h, q, k: 20 * _random(1, h, q, 1),
    "alibi": _alibi,
    "constant": lambda b, h, q, k: torch.full((1, 1, 1, 1), 3.0),
    "key-bias-expanded": lambda b, h, q, k: _random(1, 1, 1, k).expand(b, h, q, k),
    "last-dim-expanded": lambda b, h, q, k: _random(b, h, q, 1).expand(b, h, q, k),
    "transposed": _transposed,
    "heads-innermost": _heads_innermost,
    "minus-inf": lambda b, h, q, k: torch.zeros(1, 1, q, k).masked_fill(~documents(b, h, q, k), -torch.inf),
    "minus-inf-rows": lambda b, h, q, k: _random(b, 1, q, k).masked_fill(~_fully_masked_rows(b, h, q, k), -torch.inf),
}

MASKS = BOOL_MASKS | FLOAT_MASKS
