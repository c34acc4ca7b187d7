"""The tiles that the kernel keeps, as what FlexAttention takes: the same list, without a loop on the host."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparge_kernels.masks import causal_tiles
from sparge_kernels.thresholds import K_TILE, Q_TILE


def block_mask(kept: Tensor, q_len: int, k_len: int, is_causal: bool) -> BlockMask:
    """The tiles `kept`, bool [B, H, nQ, nK], of so many queries and keys: the diagonal is masked, all others full."""
    diagonal = causal_tiles(q_len, k_len, is_causal, torch.float32, kept.device).partial
    return BlockMask.from_kv_blocks(
        *_counted(kept & diagonal),
        *_counted(kept & ~diagonal),
        BLOCK_SIZE=(Q_TILE, K_TILE),
        mask_mod=_past if is_causal else None,
        seq_lengths=(q_len, k_len),
        compute_q_blocks=False,  # only a backward needs them
    )


def kept_tiles(tiles: Tensor, counts: Tensor) -> Tensor:
    """The lists of a Selection of the GPU kernels as a map, bool [B, H, nQ, nK].

    tiles int32 [B, H, nQ, nK]: indices, undefined beyond the first counts[..., 0] + counts[..., 1].
    """
    n_k = tiles.shape[-1]
    listed = torch.arange(n_k, device=tiles.device) < counts[..., :2].sum(-1, keepdim=True)
    kept = torch.zeros(*tiles.shape[:-1], n_k + 1, dtype=torch.bool, device=tiles.device)
    return kept.scatter_(-1, torch.where(listed, tiles, n_k).long(), True)[..., :n_k]


def _past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _counted(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and all of the row's tiles, those first: [..., nQ], [..., nQ, nK]."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)
