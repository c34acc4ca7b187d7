"""Q before the sparse loop: tile means, self-similarity and INT8 codes by row (predict.py, quantize.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.thresholds import Q_TILE
from sparge_kernels.tiles import tile_count
from sparge_kernels.triton import launch
from sparge_kernels.triton.rows import all_finite, int8_scale, inverse_or_zero, load_tile, round_codes, strides_in_units

_NUMBERS_A_WARP, _MOST_WARPS = 2048, 8  # of a tile: 64 in each thread
_MOST_REGISTERS = 128  # so that two programs share a processor; at D' of 64 and 128 it spills nothing


@dataclass(frozen=True)
class QueryTiles:
    """What stage 1 and the sparse loop need of Q; contiguous; D' = launch.padded(D), padded with zeros."""

    codes: Tensor | None  # int8 [B, Hq, nQ, 128, D'], 0 where exact or padding; None if not quantized
    scale: Tensor | None  # fp32 [B, Hq, nQ * 128]: NaN in a row INT8 cannot hold, 0 beyond the end; None likewise
    offset: Tensor | None  # fp32 [B, Hq, nQ * 128]: q . centre, without `sign`; None likewise
    exact: Tensor | None  # int8 [B, Hq, nQ]: 1 if INT8 cannot hold some row; None likewise
    means: Tensor  # fp32 [B, Hq, nQ, D']
    similarity: Tensor  # fp32 [B, Hq, nQ], NaN where the mean is not finite


def prepare_queries(q: Tensor, centre: Tensor | None, group: int, *, sign: int) -> QueryTiles:
    """Q [B, Hq, Sq, D], fp32, bf16 or fp16 with any strides; quantized if there is a `centre` (of KeyTiles).

    `group`: query heads of a kv head. `sign` (1 or -1) multiplies the codes: there a negative scale is carried.
    """
    batch, heads, q_len, dim = q.shape
    padded, n_q, quantized = launch.padded(dim), tile_count(q_len, Q_TILE), centre is not None

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    codes = new(n_q, Q_TILE, padded, dtype=torch.int8) if quantized else None
    scale, offset = (new(n_q * Q_TILE), new(n_q * Q_TILE)) if quantized else (None, None)
    exact = new(n_q, dtype=torch.int8) if quantized else None
    means, similarity = new(n_q, padded), new(n_q)
    strides, unit = strides_in_units(q)
    limited = 64 <= padded <= 128 and not launch.architecture(q.device).startswith("gfx")
    launch.run(
        prepare_queries_kernel, (batch * heads * n_q,),
        q, centre, codes, scale, offset, exact, means, similarity, *strides, heads, group, q_len, n_q, float(sign),
        UNIT=unit, DIM=dim, PADDED=padded, Q_TILE=Q_TILE, QUANTIZED=quantized,
        num_warps=min(Q_TILE * padded // _NUMBERS_A_WARP, _MOST_WARPS),
        **({"maxnreg": _MOST_REGISTERS} if limited else {}),
    )  # fmt: skip
    return QueryTiles(codes, scale, offset, exact, means, similarity)


@triton.jit(do_not_specialize=["heads", "group", "q_len", "n_q"])
def prepare_queries_kernel(
    q_ptr, centre_ptr, codes_ptr, scale_ptr, offset_ptr, exact_ptr,
    means_ptr, similarity_ptr, q_batch, q_head, q_token, q_dim,
    heads, group, q_len, n_q, sign,
    UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, Q_TILE: tl.constexpr, QUANTIZED: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of Q; grid (B * Hq * nQ,)."""
    program = tl.program_id(0)
    i = program % n_q
    batch, head = program // n_q // heads, program // n_q % heads
    rows, dims = i * Q_TILE + tl.arange(0, Q_TILE), tl.arange(0, PADDED)
    length = tl.minimum(q_len - i * Q_TILE, Q_TILE).to(tl.float32)
    q = load_tile(
        q_ptr, batch, head, q_batch, q_head, q_token, q_dim, rows, dims, q_len, UNIT, DIM, PADDED, ""
    )  # [128, D']

    squares = tl.sum(q * q, 1)
    mean = tl.sum(q, 0) / length
    unit_sum = tl.sum(q * inverse_or_zero(tl.math.sqrt_rn(squares), 1.0)[:, None], 0)
    similarity = tl.sum(unit_sum * unit_sum, 0) / (length * length)
    tl.store(means_ptr + program.to(tl.int64) * PADDED + dims, mean)
    tl.store(similarity_ptr + program, tl.where(all_finite(mean), similarity, float("nan")))

    if QUANTIZED:
        # Read again, from L1: kept, it would cost registers that a second program on the processor needs.
        q = load_tile(
            q_ptr, batch, head, q_batch, q_head, q_token, q_dim, rows, dims, q_len, UNIT, DIM, PADDED, "evict_first"
        )  # [128, D']
        kv_head = batch * (heads // group) + head // group
        offset = tl.sum(q * tl.load(centre_ptr + kv_head.to(tl.int64) * PADDED + dims)[None, :], 1)
        scale, exact = int8_scale(tl.max(tl.abs(q), 1))
        exact = exact | (squares != squares)  # tl.max passes over a NaN
        codes = tl.where(exact[:, None], 0, round_codes(q, inverse_or_zero(scale, sign)[:, None]))
        code_rows = program.to(tl.int64) * Q_TILE + tl.arange(0, Q_TILE)
        tl.store(codes_ptr + code_rows[:, None] * PADDED + dims[None, :], codes)
        tl.store(scale_ptr + code_rows, tl.where(exact, float("nan"), scale))
        tl.store(offset_ptr + code_rows, offset)
        tl.store(exact_ptr + program, tl.max(exact.to(tl.int32), 0).to(tl.int8))
