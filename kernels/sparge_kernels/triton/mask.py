"""attn_mask in tiles: which it hides, which it leaves alone, which it biases or cuts (masks.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.masks import MASK_SPREAD
from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.triton import launch

# MaskTiles.kind
HIDDEN: tl.constexpr = tl.constexpr(0)
OPEN: tl.constexpr = tl.constexpr(1)
BIASED: tl.constexpr = tl.constexpr(2)
PARTIAL: tl.constexpr = tl.constexpr(3)

_WARPS = 4


@dataclass(frozen=True)
class MaskTiles:
    """The tiles of a mask, contiguous; a dimension that the mask repeats has size 1, of tiles as of all else."""

    kind: Tensor  # int8 [B or 1, Hq or 1, nQ or 1, nK or 1]: HIDDEN, OPEN, BIASED, PARTIAL
    bias: Tensor  # fp32, the same shape: mean of a BIASED tile in nats, else 0


def classify_mask(attn_mask: Tensor, q_len: int, k_len: int) -> MaskTiles:
    """The tiles of a mask [B or 1, Hq or 1, Sq or 1, Sk or 1], bool or float, any strides."""
    sizes = [1 if stride == 0 else size for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True)]
    batch, heads, rows, columns = sizes
    # One row stands for all if the mask repeats it; with a single query or key that is the same.
    tile_rows, tile_columns = (1 if rows == 1 else Q_TILE), (1 if columns == 1 else K_TILE)
    n_q, n_k = triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)
    kind = torch.empty(batch, heads, n_q, n_k, dtype=torch.int8, device=attn_mask.device)
    bias = torch.empty(batch, heads, n_q, n_k, dtype=torch.float32, device=attn_mask.device)
    launch.run(
        classify_mask_kernel, (kind.numel(),),
        attn_mask, kind, bias, *attn_mask.stride(), heads, rows, columns, n_q, n_k,
        ROWS=tile_rows, COLUMNS=tile_columns, BOOL=attn_mask.dtype == torch.bool, SPREAD=MASK_SPREAD,
        num_warps=_WARPS,
    )  # fmt: skip
    return MaskTiles(kind, bias)


@triton.jit(do_not_specialize=["heads", "n_rows", "n_q", "n_k"])
def classify_mask_kernel(
    mask_ptr, kind_ptr, bias_ptr, m_batch, m_head, m_query, m_key,
    heads, n_rows, n_columns, n_q, n_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOOL: tl.constexpr, SPREAD: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the mask; grid (number of tiles,)."""
    program = tl.program_id(0)
    i, j = program // n_k % n_q, program % n_k
    head = program // n_k // n_q
    rows, columns = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    at = mask_ptr + (head // heads).to(tl.int64) * m_batch + (head % heads).to(tl.int64) * m_head
    at += rows.to(tl.int64)[:, None] * m_query + columns.to(tl.int64)[None, :] * m_key
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    x = tl.load(at, mask=inside, other=0)  # [ROWS, COLUMNS]
    if BOOL:
        attended = tl.max(tl.max((inside & (x != 0)).to(tl.int32), 1), 0) != 0
        cut = tl.max(tl.max((inside & (x == 0)).to(tl.int32), 1), 0) != 0
        kind = tl.where(attended, tl.where(cut, PARTIAL, OPEN), HIDDEN)
        bias = 0.0
    else:
        x = x.to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # either makes a tile partial
        largest = tl.max(tl.max(tl.where(inside, x, float("-inf")), 1), 0)
        smallest = tl.min(tl.min(tl.where(inside, x, float("inf")), 1), 0)
        numbers = tl.minimum(n_rows - i * ROWS, ROWS) * tl.minimum(n_columns - j * COLUMNS, COLUMNS)
        # Divided first: the sum of a tile of the largest numbers is no number.
        mean = tl.sum(tl.sum(x * (1.0 / numbers.to(tl.float32)), 1), 0)
        mean = tl.minimum(tl.maximum(mean, smallest), largest)
        plain = (largest < float("inf")) & (largest - smallest <= SPREAD)
        is_open = (largest == 0.0) & (smallest == 0.0)
        kind = tl.where(plain, tl.where(is_open, OPEN, BIASED), tl.where(largest == float("-inf"), HIDDEN, PARTIAL))
        bias = tl.where(plain, mean, 0.0)
    tl.store(kind_ptr + program, kind.to(tl.int8))
    tl.store(bias_ptr + program, bias)
