"""The sparse loop: one program per query tile walks its list of K tiles (arXiv 2502.18137, algorithm 1).

Two loops. The first takes the plain tiles: INT8 products, no mask, no bounds, no branch but stage 2's. The second takes
what is left and computes it exactly: the diagonal, tiles under a mask, the ragged end, numbers INT8 cannot hold. Scores
are in log2 units, so that the softmax is exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparge_kernels.triton.keys import NON_FINITE_V
from sparge_kernels.triton.mask import PARTIAL

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LARGEST_BF16: tl.constexpr = tl.constexpr(3.3895313892515355e38)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)

# What attn_mask is.
NO_MASK: tl.constexpr = tl.constexpr(0)
BOOL_MASK: tl.constexpr = tl.constexpr(1)
FLOAT_MASK: tl.constexpr = tl.constexpr(2)

# A new value of these is no new kernel. Of a mask the stride of the keys alone decides how it is loaded.
NOT_SPECIALIZED = ["heads", "group", "q_len", "k_len", "n_q", "n_k", "mask_batch", "mask_head", "mask_query"]
NOT_SPECIALIZED += ["kind_batch", "kind_head", "kind_query", "kind_key"]


@triton.jit
def multiply(a, b, acc, PRODUCT: tl.constexpr):
    """acc + a @ b in fp32. PRODUCT: how fp32 operands keep their digits ("tf32x3", "ieee"), or "widened".

    "widened": for Triton's interpreter (3.6 to 3.9), whose dot multiplies the bit patterns of bf16 numbers.
    """
    if PRODUCT == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRODUCT)
    return tl.dot(a, b, acc)


@triton.jit
def unquantized_scores(
    q_rows, k_rows, q_len, k_len, rows, keys, q_token, k_token, scale,
    UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Q K^T * scale in log2 units [rows, keys], CHUNK dimensions at a time: all of Q would fill the registers."""
    q_at = q_rows + rows.to(tl.int64)[:, None] * q_token * UNIT
    k_at = k_rows + keys.to(tl.int64)[None, :] * k_token * UNIT
    s = tl.zeros([rows.shape[0], keys.shape[0]], tl.float32)
    for first in tl.range(0, PADDED, CHUNK, num_stages=1):  # at run time: unrolled, it would be hoisted whole
        dims = first + tl.arange(0, CHUNK)
        q = tl.load(q_at + dims[None, :], mask=(rows < q_len)[:, None] & (dims < DIM)[None, :], other=0.0)
        k = tl.load(k_at + dims[:, None], mask=(keys < k_len)[None, :] & (dims < DIM)[:, None], other=0.0)
        s = multiply(q, k, s, PRODUCT)
    return s * (scale * LOG2_E)


@triton.jit
def mask_scores(
    s, mask_rows, rows, keys, mask_query, mask_key, q_len, k_len, wanted, CAUSAL: tl.constexpr, MASK: tl.constexpr
):
    """s under causality and mask, -inf where hidden, and which keys the rows see but for the mask [rows, keys].

    `wanted` [rows]: the rows that meet the tile.
    """
    seen = (keys < k_len)[None, :] & wanted[:, None]
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    if MASK != NO_MASK:
        mask_at = mask_rows + rows.to(tl.int64)[:, None] * mask_query + keys.to(tl.int64)[None, :] * mask_key
        inside = (rows < q_len)[:, None] & (keys < k_len)[None, :]
        if MASK == BOOL_MASK:
            s = tl.where(tl.load(mask_at, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            bias = tl.load(mask_at, mask=inside, other=0.0).to(tl.float32)
            # The finite minimum of a dtype must not become -inf: rows of nothing else are rows of equal keys.
            within = tl.minimum(tl.maximum(bias * LOG2_E, -LARGEST), LARGEST)
            s += tl.where(tl.abs(bias) < float("inf"), within, bias)
    return tl.where(seen, s, float("-inf")), seen


@triton.jit
def _finite(x):
    """x, with 0 in place of inf and NaN."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def _narrow(v, NARROW: tl.constexpr):
    """v, in bf16 if NARROW; fp32 numbers beyond bf16's largest do not become inf."""
    if NARROW:
        v = tl.minimum(tl.maximum(v, -LARGEST_BF16), LARGEST_BF16)
    return v.to(tl.bfloat16) if NARROW else v


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    q_codes, q_scales, q_offsets, q_exact, k_codes, k_scales, k_flags, kind_ptr,
    tiles_ptr, counts_ptr, order_ptr, thresholds_ptr, skipped_ptr, spoiled_ptr, maximum_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, mask_batch, mask_head, mask_query, mask_key,
    kind_batch, kind_head, kind_query, kind_key, heads, group, q_len, k_len, n_q, n_k, scale, certificate,
    UNIT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, V_DIM: tl.constexpr, V_PADDED: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    QUANTIZED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, STAGE_2: tl.constexpr, LSE: tl.constexpr,
    HOLD_Q: tl.constexpr, PRODUCT: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """Writes ROWS rows of a query tile of the output; grid (B * Hq * nQ * Q_TILE / ROWS,).

    Heads one after another keep K and V in L2. Strides of q, k, v and out are in units of UNIT numbers; the last is 1.
    """
    PARTS: tl.constexpr = Q_TILE // ROWS
    program = tl.program_id(0).to(tl.int64) // PARTS
    part = tl.program_id(0) % PARTS
    head = program // n_q  # of all batches
    i = tl.load(order_ptr + program)
    batch, q_head_index = head // heads, head % heads
    kv_head_index = q_head_index // group
    kv_head = batch * (heads // group) + kv_head_index
    tile_row = head * n_q + i

    in_tile = part * ROWS + tl.arange(0, ROWS)
    rows = i * Q_TILE + in_tile
    keys_in_tile = tl.arange(0, K_TILE)
    dims, v_dims = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    q_rows = q_ptr + (batch * q_batch + q_head_index * q_head) * UNIT
    k_rows = k_ptr + (batch * k_batch + kv_head_index * k_head) * UNIT
    v_rows = v_ptr + (batch * v_batch + kv_head_index * v_head) * UNIT
    # The weights meet V in its dtype; fp32 V in bf16 when the scores are quantized anyway.
    NARROW_V: tl.constexpr = QUANTIZED and v_ptr.dtype.element_ty == tl.float32
    PV_TYPE: tl.constexpr = tl.bfloat16 if NARROW_V else v_ptr.dtype.element_ty

    list_at = tiles_ptr + tile_row * n_k
    n_plain = tl.load(counts_ptr + tile_row * 3)
    n_all = n_plain + tl.load(counts_ptr + tile_row * 3 + 1)
    if i * Q_TILE + part * ROWS >= q_len:  # no row is here
        n_plain, n_all = 0, 0
    skip_below = 0.0
    if STAGE_2:
        pv = tl.load(thresholds_ptr + q_head_index * 4 + 3).to(tl.float32)
        skip_below = tl.where(pv == 0, certificate, pv) * LOG2_E

    m = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_PADDED], tl.float32)
    skipped = 0
    first_exact = n_plain
    row_exact = rows < 0
    if QUANTIZED:
        q = tl.load(q_codes + (tile_row * Q_TILE + in_tile)[:, None] * PADDED + dims[None, :])  # [BM, D']
        q_scale = tl.load(q_scales + tile_row * Q_TILE + in_tile)  # [BM]
        row_exact = q_scale != q_scale
        if tl.load(q_exact + tile_row) != 0:
            first_exact = 0
    elif HOLD_Q:
        q_at = q_rows + rows.to(tl.int64)[:, None] * q_token * UNIT + dims[None, :]
        q = tl.load(q_at, mask=(rows < q_len)[:, None] & (dims < DIM)[None, :], other=0.0)  # [BM, D']
    counted = (rows < q_len) & (row_exact == 0)

    for t in tl.range(0, n_plain, num_stages=LOOP_STAGES):
        j = tl.load(list_at + t)
        v_at = v_rows + (j * K_TILE + keys_in_tile).to(tl.int64)[:, None] * v_token * UNIT + v_dims[None, :]
        # Loaded before stage 2 may skip it: behind the branch the loads are not pipelined.
        v = tl.load(v_at) if V_DIM == V_PADDED else tl.load(v_at, mask=(v_dims < V_DIM)[None, :], other=0.0)
        if QUANTIZED:
            code_rows = (kv_head * n_k + j) * K_TILE + keys_in_tile
            k = tl.load(k_codes + code_rows[None, :] * PADDED + dims[:, None])  # [D', BN]
            # Not negative: the codes of Q carry the sign of a negative scale.
            factor = q_scale * (tl.load(k_scales + kv_head * n_k + j) * (tl.abs(scale) * LOG2_E))  # [BM]
            s = tl.dot(q, k).to(tl.float32)  # [BM, BN]
        else:
            factor = tl.full([ROWS], 1.0, tl.float32)
            if HOLD_Q:
                k_at = k_rows + (j * K_TILE + keys_in_tile).to(tl.int64)[None, :] * k_token * UNIT + dims[:, None]
                k = tl.load(k_at) if DIM == PADDED else tl.load(k_at, mask=(dims < DIM)[:, None], other=0.0)
                s = multiply(q, k, tl.zeros([ROWS, K_TILE], tl.float32), PRODUCT) * (scale * LOG2_E)
            else:
                s = unquantized_scores(
                    q_rows, k_rows, q_len, k_len, rows, j * K_TILE + keys_in_tile, q_token, k_token, scale,
                    UNIT, DIM, PADDED, CHUNK, PRODUCT,
                )  # fmt: skip
        largest = tl.max(s, 1) * factor
        m_new = tl.maximum(m, largest)
        base = m_new
        if not QUANTIZED:  # codes give finite scores
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * factor[:, None] - base[:, None])
        decay = tl.exp2(m - base)
        mass = mass * decay + tl.sum(p, 1)
        if STAGE_2:
            gap = tl.where(counted & (largest > float("-inf")), largest - m_new, float("-inf"))
            gap = tl.max(tl.where(gap == gap, gap, float("-inf")), 0)  # a NaN row is no reason to compute
            # Below: no row's maximum moved, so the decay is 1.
            if gap >= skip_below:
                acc = multiply(p.to(PV_TYPE), _narrow(v, NARROW_V), acc * decay[:, None], PRODUCT)
            else:
                skipped += 1
        else:
            acc = multiply(p.to(PV_TYPE), _narrow(v, NARROW_V), acc * decay[:, None], PRODUCT)
        m = m_new

    if QUANTIZED:
        # q . c, which centring took from every plain tile's scores.
        m += tl.load(q_offsets + tile_row * Q_TILE + in_tile) * (scale * LOG2_E)
        m = tl.where(row_exact | (n_plain == 0), float("-inf"), m)
        mass = tl.where(row_exact, 0.0, mass)
        acc = tl.where(row_exact[:, None], 0.0, acc)
    mask_rows = mask_ptr
    if MASK != NO_MASK:
        mask_rows += batch * mask_batch + q_head_index * mask_head
    spoiled = 0
    for t in range(first_exact, n_all):
        j = tl.load(list_at + t)
        keys = j * K_TILE + keys_in_tile
        s = unquantized_scores(
            q_rows, k_rows, q_len, k_len, rows, keys, q_token, k_token, scale, UNIT, DIM, PADDED, CHUNK, PRODUCT
        )
        wanted = row_exact | (t >= n_plain)  # a plain tile is here for the rows INT8 cannot hold
        s, _ = mask_scores(s, mask_rows, rows, keys, mask_query, mask_key, q_len, k_len, wanted, CAUSAL, MASK)
        largest = tl.max(s, 1)
        m_new = tl.maximum(m, largest)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(m - base)
        mass = mass * decay + tl.sum(p, 1)
        v_spoils = tl.load(k_flags + kv_head * n_k + j) & NON_FINITE_V
        spoiled |= v_spoils
        take = True
        if STAGE_2:
            gap = tl.where((largest > float("-inf")) & (rows < q_len), largest - m_new, float("-inf"))
            gap = tl.where(gap == gap, gap, float("-inf"))  # a NaN row is no reason to compute
            exempt = (v_spoils != 0) | (t < n_plain)
            if CAUSAL:
                exempt = exempt | (tl.minimum(j * K_TILE + K_TILE, k_len) > i * Q_TILE)
            if MASK != NO_MASK:
                kind_at = kind_ptr + batch * kind_batch + q_head_index * kind_head
                exempt = exempt | (tl.load(kind_at + i * kind_query + j * kind_key) == PARTIAL)
            take = exempt | (tl.max(gap, 0) >= skip_below)
        if take:
            v_at = v_rows + keys.to(tl.int64)[:, None] * v_token * UNIT + v_dims[None, :]
            v = tl.load(v_at, mask=(keys < k_len)[:, None] & (v_dims < V_DIM)[None, :], other=0.0)
            acc = multiply(p.to(PV_TYPE), _narrow(_finite(v), NARROW_V), acc * decay[:, None], PRODUCT)
        else:
            skipped += 1
        m = m_new

    out_at = out_ptr + (batch * out_batch + q_head_index * out_head) * UNIT
    out_at += rows.to(tl.int64)[:, None] * out_token * UNIT + v_dims[None, :]
    out = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(rows < q_len)[:, None] & (v_dims < V_DIM)[None, :])
    if LSE:
        tl.store(lse_ptr + head * q_len + rows, m * LN_2 + tl.log(mass), mask=rows < q_len)
    if STAGE_2:
        tl.store(skipped_ptr + tile_row * PARTS + part, skipped)
    # The same in every part that has rows.
    tl.store(spoiled_ptr + tile_row, spoiled, mask=i * Q_TILE + part * ROWS < q_len)
    tl.store(maximum_ptr + tile_row * Q_TILE + in_tile, m)
