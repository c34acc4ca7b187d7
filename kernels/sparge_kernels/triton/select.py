"""Stage 1: scores of the tile means, and from them each query tile's list of K tiles (predict.py).

Nothing is sorted: the score at which enough is kept is found by bisection in registers, the lists by prefix sums, the
longest list by counting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparge_kernels.thresholds import K_TILE, Q_TILE
from sparge_kernels.tiles import tile_count
from sparge_kernels.triton import launch
from sparge_kernels.triton.keys import KeyTiles
from sparge_kernels.triton.mask import BIASED, HIDDEN, PARTIAL, MaskTiles
from sparge_kernels.triton.queries import QueryTiles
from sparge_kernels.triton.rows import broadcast_strides

MAX_K_TILES = 8192
"""A row of tiles lies in the registers of one program."""

_CEIL_SLACK: tl.constexpr = tl.constexpr(1e-6)  # predict._CEIL_SLACK
_LOWEST: tl.constexpr = tl.constexpr(-(2**31))
# Bits of what a tile is to a query tile; neither whole nor partial: hidden.
_WHOLE: tl.constexpr = tl.constexpr(1)
_PREDICTABLE: tl.constexpr = tl.constexpr(2)
_CANDIDATE: tl.constexpr = tl.constexpr(3)
_PARTIAL: tl.constexpr = tl.constexpr(4)
_EXACT: tl.constexpr = tl.constexpr(8)

_SCORE_Q, _SCORE_K, _SCORE_DIMS, _SCORE_WARPS = 32, 64, 32, 4
_TILES_A_WARP, _MOST_WARPS = 512, 16  # of the selection
_ORDER_BLOCK, _ORDER_OTHERS, _ORDER_WARPS = 32, 64, 4


@dataclass(frozen=True)
class Selection:
    """The tiles to compute; contiguous."""

    tiles: Tensor  # int32 [B, Hq, nQ, nK]: the quantized ones ascending, the exact ones ascending, rest undefined
    counts: Tensor  # int32 [B, Hq, nQ, 3]: quantized, exact, visible
    order: Tensor  # int32 [B, Hq, nQ]: query tiles, longest list first, of equal ones the later

    def kept(self) -> Tensor:
        """The lists as a map, bool [B, Hq, nQ, nK]."""
        n_k = self.tiles.shape[-1]
        listed = torch.arange(n_k, device=self.tiles.device) < self.counts[..., :2].sum(-1, keepdim=True)
        room = torch.zeros(*self.tiles.shape[:3], n_k + 1, dtype=torch.bool, device=self.tiles.device)
        return room.scatter_(-1, torch.where(listed, self.tiles, n_k).long(), True)[..., :-1]


def select_tiles(
    queries: QueryTiles,
    keys: KeyTiles,
    mask_tiles: MaskTiles | None,
    thresholds: Tensor,
    *,
    is_causal: bool,
    scale: float,
    q_len: int,
    k_len: int,
    weights: Tensor | None = None,
) -> Selection:
    """predict.select_tiles as lists. thresholds: fp64 [Hq, 4] as thresholds.pack gives them, on the device.

    weights: fp32 [B, Hq, nQ, nK] of the predictor "clusters" (weights.py), overwritten; None: the predictor "sparge".
    Exact are tiles that are partial (the diagonal, cut by the mask), biased, ragged, or have a flag of `keys`.
    """
    batch, heads, n_q = queries.similarity.shape
    n_k, group = tile_count(k_len, K_TILE), heads // keys.similarity.shape[1]
    if n_k > MAX_K_TILES:
        raise ValueError(f"{k_len} keys; at most {MAX_K_TILES * K_TILE} are allowed. Split the keys or run dense.")
    scores = weights
    if scores is None:
        scores = score_tiles(queries, keys, mask_tiles, is_causal=is_causal, scale=scale)
    tiles = scores.view(torch.int32)  # a program has read its row before it writes it
    counts = torch.empty(batch, heads, n_q, 3, dtype=torch.int32, device=scores.device)
    kind = None if mask_tiles is None else mask_tiles.kind
    block = max(32, triton.next_power_of_2(n_k))
    launch.run(
        select_tiles_kernel, (batch * heads * n_q,),
        scores, tiles, counts, queries.similarity, keys.similarity, keys.flags, kind, thresholds,
        *broadcast_strides(kind), heads, group, q_len, k_len, n_q, n_k,
        Q_TILE=Q_TILE, K_TILE=K_TILE, CAUSAL=is_causal, MASKED=kind is not None, WEIGHED=weights is not None,
        BLOCK=block, LONG=block > _TILES_A_WARP * _MOST_WARPS // 2,
        num_warps=min(max(block // _TILES_A_WARP, 1), _MOST_WARPS),
    )  # fmt: skip
    return Selection(tiles, counts, order_tiles(counts))


def order_tiles(counts: Tensor) -> Tensor:
    """Selection.order of Selection.counts."""
    batch, heads, n_q = counts.shape[:3]
    order = torch.empty(batch, heads, n_q, dtype=torch.int32, device=counts.device)
    launch.run(
        order_tiles_kernel, (batch * heads, triton.cdiv(n_q, _ORDER_BLOCK)),
        counts, order, n_q, BLOCK=_ORDER_BLOCK, OTHERS=_ORDER_OTHERS, num_warps=_ORDER_WARPS,
    )  # fmt: skip
    return order


def score_tiles(
    queries: QueryTiles, keys: KeyTiles, mask_tiles: MaskTiles | None, *, is_causal: bool, scale: float
) -> Tensor:
    """predict.proxy_scores plus the mask's bias, fp32 [B, Hq, nQ, nK]; undefined in the causal future."""
    batch, heads, n_q, padded = queries.means.shape
    kv_heads, n_k = keys.means.shape[1:3]
    scores = torch.empty(batch, heads, n_q, n_k, dtype=torch.float32, device=queries.means.device)
    bias = None if mask_tiles is None else mask_tiles.bias
    q_blocks, k_blocks = triton.cdiv(n_q, _SCORE_Q), triton.cdiv(n_k, _SCORE_K)
    launch.run(
        score_tiles_kernel, (batch * heads * q_blocks * k_blocks,),
        queries.means, keys.means, bias, scores, *broadcast_strides(bias),
        heads, heads // kv_heads, n_q, n_k, q_blocks, k_blocks, float(scale),
        PADDED=padded, BLOCK_Q=_SCORE_Q, BLOCK_K=_SCORE_K, DIMS=min(_SCORE_DIMS, padded // 2),
        CAUSAL=is_causal, MASKED=bias is not None,
        K_TILES_A_Q_TILE=Q_TILE // K_TILE, num_warps=_SCORE_WARPS,
    )  # fmt: skip
    return scores


@triton.jit(
    do_not_specialize=["bias_batch", "bias_head", "bias_query", "heads", "group", "n_q", "n_k", "q_blocks", "k_blocks"]
)
def score_tiles_kernel(
    q_means, k_means, bias_ptr, scores_ptr,
    bias_batch, bias_head, bias_query, bias_key,
    heads, group, n_q, n_k, q_blocks, k_blocks, scale,
    PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIMS: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, K_TILES_A_Q_TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Scores of BLOCK_Q query tiles and BLOCK_K K tiles; grid (B * Hq * query blocks * K blocks,)."""
    program = tl.program_id(0)
    q_first, k_first = program // k_blocks % q_blocks * BLOCK_Q, program % k_blocks * BLOCK_K
    if CAUSAL:  # noqa: SIM102 - `and` would make a constexpr a tensor
        if k_first >= (q_first + BLOCK_Q) * K_TILES_A_Q_TILE:  # all in the future
            return
    head = (program // k_blocks // q_blocks).to(tl.int64)
    kv_head = head // heads * (heads // group) + head % heads // group
    q_tiles, k_tiles = q_first + tl.arange(0, BLOCK_Q), k_first + tl.arange(0, BLOCK_K)
    q_seen, k_seen = q_tiles < n_q, k_tiles < n_k
    q_at = q_means + (head * n_q + q_tiles)[:, None] * PADDED
    k_at = k_means + (kv_head * n_k + k_tiles)[None, :] * PADDED
    scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in range(0, PADDED, DIMS):
        dims = first + tl.arange(0, DIMS)
        q = tl.load(q_at + dims[None, :], mask=q_seen[:, None], other=0.0)  # [BLOCK_Q, DIMS]
        k = tl.load(k_at + dims[:, None], mask=k_seen[None, :], other=0.0)  # [DIMS, BLOCK_K]
        scores = tl.dot(q, k, scores, input_precision="ieee")
    scores *= scale
    seen = q_seen[:, None] & k_seen[None, :]
    if MASKED:
        bias_at = bias_ptr + head // heads * bias_batch + head % heads * bias_head
        bias_at += q_tiles.to(tl.int64)[:, None] * bias_query + k_tiles.to(tl.int64)[None, :] * bias_key
        scores += tl.load(bias_at, mask=seen, other=0.0)
    tl.store(scores_ptr + (head * n_q + q_tiles)[:, None] * n_k + k_tiles[None, :], scores, mask=seen)


@triton.jit
def _tiles_to_keep(candidates, topk):
    """ceil(topk * candidates), at least 1; `topk` is fp64."""
    allowed = tl.sum(candidates.to(tl.int32), 0).to(tl.float64) * topk - tl.full((), _CEIL_SLACK, tl.float64)
    return tl.maximum(tl.ceil(allowed), 1.0).to(tl.float32)


@triton.jit
def _ordered(scores, inside):
    """Integers in the order of the scores; the lowest of all where not inside."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LOWEST)


@triton.jit
def keep_largest(scores, candidates, inside, topk, cdf):
    """predict.keep_largest of one row, bool [BLOCK], of candidates only; `topk` (0: none) and `cdf` are fp64."""
    scores = tl.where(candidates, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    total = tl.sum(weights, 0)
    by_count = topk > 0.0
    # What is kept sums up to `needed`: of ones, or of the softmax. No sum reaches inf: all are kept.
    needed = tl.where(cdf >= 1.0, float("inf"), cdf.to(tl.float32))
    needed = tl.where(by_count, _tiles_to_keep(candidates, topk), needed)
    weights = tl.where(by_count, inside.to(tl.float32), weights * (1.0 / total))

    image = _ordered(scores, inside)
    # The largest threshold that enough lies at or above: sign, then bit by bit.
    threshold = tl.where(tl.sum(tl.where(image >= 0, weights, 0.0), 0) >= needed, 0, _LOWEST)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        trial = threshold + bit
        threshold = tl.where(tl.sum(tl.where(image >= trial, weights, 0.0), 0) >= needed, trial, threshold)
        bit = bit >> 1
    above = tl.sum(tl.where(image > threshold, weights, 0.0), 0)
    equal = (image == threshold).to(tl.int32)
    lower_equals = (tl.cumsum(equal, 0) - equal).to(tl.float32)
    kept = (image > threshold) | ((equal != 0) & (above + lower_equals * weights < needed))
    # A row of NaN keeps all. Of scalars no `|`: the interpreter broadcasts their comparisons as fp32.
    return tl.where(total != total, image == image, kept)


@triton.jit
def drop_smallest(weights, candidates, inside, topk, cdf):
    """predict.drop_smallest of one row, bool [BLOCK], of candidates only; `topk` (0: none) and `cdf` are fp64."""
    ranks = tl.where(candidates, weights, float("-inf"))
    unknown = tl.max((ranks != ranks).to(tl.int32), 0)
    by_count = topk > 0.0
    # What is dropped sums up to at most `budget`: of ones, or of the weights. No sum is below 0: all are kept.
    budget = tl.where(cdf >= 1.0, -1.0, (1.0 - cdf).to(tl.float32))
    budget = tl.where(by_count, tl.sum(inside.to(tl.float32), 0) - _tiles_to_keep(candidates, topk), budget)
    # A weight above 1 is over any budget: cut there, no sum of the others drowns in it.
    amounts = tl.where(by_count, inside.to(tl.float32), tl.exp(tl.minimum(ranks, 1.0)))

    image = _ordered(ranks, inside)
    # The largest threshold below which all may be dropped: sign, then bit by bit.
    threshold = tl.where(tl.sum(tl.where(image < 0, amounts, 0.0), 0) <= budget, 0, _LOWEST)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        trial = threshold + bit
        threshold = tl.where(tl.sum(tl.where(image < trial, amounts, 0.0), 0) <= budget, trial, threshold)
        bit = bit >> 1
    below = tl.sum(tl.where(image < threshold, amounts, 0.0), 0)
    equal = (image == threshold).to(tl.int32)
    amount = tl.max(tl.where(equal != 0, amounts, 0.0), 0)  # theirs is the same: a number costs less than a row
    equals_from_here = (tl.sum(equal, 0) - tl.cumsum(equal, 0) + equal).to(tl.float32)
    kept = (image > threshold) | ((equal != 0) & (below + equals_from_here * amount > budget))
    return tl.where(unknown != 0, image == image, kept)


@triton.jit(
    do_not_specialize=["kind_batch", "kind_head", "kind_query", "heads", "group", "q_len", "k_len", "n_q", "n_k"]
)
def select_tiles_kernel(
    scores_ptr, tiles_ptr, counts_ptr, q_similarity, k_similarity, k_flags,
    kind_ptr, thresholds_ptr, kind_batch, kind_head, kind_query, kind_key,
    heads, group, q_len, k_len, n_q, n_k,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHED: tl.constexpr, LONG: tl.constexpr,
) -> None:  # fmt: skip
    """The list and the counts of one query tile; grid (B * Hq * nQ,)."""
    row = tl.program_id(0).to(tl.int64)
    head, i = tl.program_id(0) // n_q, tl.program_id(0) % n_q
    batch, q_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv_head = batch * (heads // group) + q_head // group
    tiles = tl.arange(0, BLOCK)
    inside = tiles < n_k
    # What a tile is, in bits, because every row of booleans costs a row of registers.
    state = tl.where(inside, _WHOLE, 0)
    if CAUSAL:
        past = tl.minimum(tiles * K_TILE + K_TILE, k_len) <= i * Q_TILE
        diagonal = tiles * K_TILE < tl.minimum(i * Q_TILE + Q_TILE, q_len)
        state = tl.where(inside, tl.where(past, _WHOLE, tl.where(diagonal, _PARTIAL | _EXACT, 0)), 0)
    if MASKED:
        kind_at = kind_ptr + batch * kind_batch + q_head * kind_head + i.to(tl.int64) * kind_query
        kind = tl.load(kind_at + tiles * kind_key, mask=inside, other=HIDDEN)
        state = tl.where(kind == BIASED, _WHOLE | _EXACT, tl.where(kind == PARTIAL, _PARTIAL | _EXACT, state))
        state = tl.where(kind == HIDDEN, 0, state)
    flags = tl.load(k_flags + kv_head * n_k + tiles, mask=inside, other=0)
    state = state | tl.where((flags != 0) | (tiles * K_TILE + K_TILE > k_len), _EXACT, 0)
    numbers = thresholds_ptr + q_head * 4
    topk, cdf, theta = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2).to(tl.float32)
    similarity = tl.load(k_similarity + kv_head * n_k + tiles, mask=inside, other=float("nan"))
    state = state | tl.where(similarity >= theta, _PREDICTABLE, 0)

    scores = tl.load(scores_ptr + row * n_k + tiles, mask=(state & _WHOLE) != 0, other=float("-inf"))
    if LONG:  # registers are short: what was read makes room for the states
        tl.debug_barrier()
        tl.store(tiles_ptr + row * n_k + tiles, state, mask=inside)
        tl.debug_barrier()
    if WEIGHED:
        largest = drop_smallest(scores, (state & _CANDIDATE) == _CANDIDATE, inside, topk, cdf)
    else:
        largest = keep_largest(scores, (state & _CANDIDATE) == _CANDIDATE, inside, topk, cdf)
    if LONG:
        state = tl.load(tiles_ptr + row * n_k + tiles, mask=inside, other=0)
    largest = largest | ((state & _PREDICTABLE) == 0)
    visible = (state & (_WHOLE | _PARTIAL)) != 0
    kept = ((state & _PARTIAL) != 0) | (((state & _WHOLE) != 0) & largest)
    similarity = tl.load(q_similarity + row)
    kept = tl.where(similarity == similarity if WEIGHED else similarity >= theta, kept, visible)

    # Two prefix sums in one: exact tiles count in the upper half.
    counted = tl.where(kept, tl.where((state & _EXACT) != 0, 1 << 16, 1), 0)
    ends, total = tl.cumsum(counted, 0), tl.sum(counted, 0)
    place = tl.where((state & _EXACT) != 0, (total & 0xFFFF) + (ends >> 16), ends & 0xFFFF) - 1
    tl.debug_barrier()  # the list takes the place of the scores, which all threads have read by now
    tl.store(tiles_ptr + row * n_k + place, tiles, mask=kept)
    tl.store(counts_ptr + row * 3, total & 0xFFFF)
    tl.store(counts_ptr + row * 3 + 1, total >> 16)
    tl.store(counts_ptr + row * 3 + 2, tl.sum(visible.to(tl.int32), 0))


@triton.jit(do_not_specialize=["n_q"])
def order_tiles_kernel(counts_ptr, order_ptr, n_q, BLOCK: tl.constexpr, OTHERS: tl.constexpr) -> None:
    """Ranks BLOCK query tiles of a head by how many come before each; grid (B * Hq, blocks of query tiles)."""
    first = tl.program_id(0).to(tl.int64) * n_q  # of the head
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = counts_ptr + (first + mine) * 3
    my_count = tl.load(at, mask=mine < n_q, other=0) + tl.load(at + 1, mask=mine < n_q, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_q, OTHERS):
        others = start + tl.arange(0, OTHERS)
        other_at = counts_ptr + (first + others) * 3
        count = tl.load(other_at, mask=others < n_q, other=-1) + tl.load(other_at + 1, mask=others < n_q, other=0)
        tied = (count[None, :] == my_count[:, None]) & (others[None, :] > mine[:, None])
        rank += tl.sum(((count[None, :] > my_count[:, None]) | tied).to(tl.int32), 1)
    tl.store(order_ptr + first + rank, mine, mask=mine < n_q)
