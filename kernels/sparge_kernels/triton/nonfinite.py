"""What inf and NaN in V do to the output. The sparse loop took them for 0, because 0 * inf is NaN also where the 0 says
that the row does not see the key.

A kernel of its own, whose programs end at once where all is finite: inside the sparse loop it would cost registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparge_kernels.triton.attend import NO_MASK, NOT_SPECIALIZED, mask_scores, unquantized_scores
from sparge_kernels.triton.keys import NON_FINITE_V


@triton.jit(do_not_specialize=[name for name in NOT_SPECIALIZED if not name.startswith("kind")])
def spread_non_finite_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, k_flags, tiles_ptr, counts_ptr, spoiled_ptr, maximum_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, mask_batch, mask_head, mask_query, mask_key,
    heads, group, q_len, k_len, n_q, n_k, scale,
    UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, V_DIM: tl.constexpr, V_PADDED: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PRODUCT: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Adds what the non-finite numbers of V add to a query tile of the output, in place; grid (B * Hq * nQ,)."""
    tile_row = tl.program_id(0).to(tl.int64)
    if tl.load(spoiled_ptr + tile_row) == 0:
        return
    head, i = tile_row // n_q, (tile_row % n_q).to(tl.int32)
    batch, q_head_index = head // heads, head % heads
    kv_head_index = q_head_index // group
    flags_at = k_flags + (batch * (heads // group) + kv_head_index) * n_k
    rows = i * Q_TILE + tl.arange(0, Q_TILE)
    q_rows = q_ptr + (batch * q_batch + q_head_index * q_head) * UNIT
    k_rows = k_ptr + (batch * k_batch + kv_head_index * k_head) * UNIT
    v_rows = v_ptr + (batch * v_batch + kv_head_index * v_head) * UNIT
    out_rows = out_ptr + (batch * out_batch + q_head_index * out_head) * UNIT
    mask_rows = mask_ptr
    if MASK != NO_MASK:
        mask_rows += batch * mask_batch + q_head_index * mask_head
    base = tl.load(maximum_ptr + tile_row * Q_TILE + tl.arange(0, Q_TILE))
    base = tl.where(base == float("-inf"), 0.0, base)
    n_plain = tl.load(counts_ptr + tile_row * 3)
    n_all = n_plain + tl.load(counts_ptr + tile_row * 3 + 1)
    PARTS: tl.constexpr = K_TILE // FEW
    for part in range(n_plain * PARTS, n_all * PARTS):
        j = tl.load(tiles_ptr + tile_row * n_k + part // PARTS)
        if (tl.load(flags_at + j) & NON_FINITE_V) != 0:
            keys = j * K_TILE + (part % PARTS) * FEW + tl.arange(0, FEW)
            s = unquantized_scores(
                q_rows, k_rows, q_len, k_len, rows, keys, q_token, k_token, scale, UNIT, DIM, PADDED, CHUNK, PRODUCT
            )
            s, seen = mask_scores(s, mask_rows, rows, keys, mask_query, mask_key, q_len, k_len, rows >= 0, CAUSAL, MASK)
            weights = tl.where(seen, tl.exp2(s - base[:, None]), -1.0)
            _add_columns(
                out_rows, weights, v_rows, rows, keys, v_token * UNIT, out_token * UNIT, q_len, k_len,
                V_DIM, V_PADDED, FEW,
            )  # fmt: skip


@triton.jit
def _add_columns(
    out_rows, weights, v_rows, rows, keys, v_token, out_token, q_len, k_len,
    V_DIM: tl.constexpr, V_PADDED: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Adds inf and NaN of `FEW` rows of V times weights [BM, FEW] to the output; a weight of -1 is "not seen"."""
    few = tl.arange(0, FEW)
    for start in range(0, V_PADDED, FEW):
        dims = start + few
        out_at = out_rows + rows.to(tl.int64)[:, None] * out_token + dims[None, :]
        out_seen = (rows < q_len)[:, None] & (dims < V_DIM)[None, :]
        before = tl.load(out_at, mask=out_seen, other=0.0).to(tl.float32)  # [BM, FEW]
        out = before
        v_at = v_rows + keys.to(tl.int64)[:, None] * v_token + dims[None, :]
        v = tl.load(v_at, mask=(keys < k_len)[:, None] & (dims < V_DIM)[None, :], other=0.0).to(tl.float32)
        v = tl.where(tl.abs(v) < float("inf"), 0.0, v)  # [FEW, FEW], what is finite was added before
        for n in range(FEW):
            weight = tl.sum(tl.where(few[None, :] == n, weights, 0.0), 1)  # [BM]
            v_row = tl.sum(tl.where(few[:, None] == n, v, 0.0), 0)  # [FEW]
            out += tl.where((weight >= 0.0)[:, None] & (v_row != 0.0)[None, :], weight[:, None] * v_row[None, :], 0.0)
        changed = out_seen & ((out == before) == 0)  # else -0 would become 0
        tl.store(out_at, out.to(out_rows.dtype.element_ty), mask=changed)
