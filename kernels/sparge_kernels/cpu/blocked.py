"""`sparge::attention` on the CPU in plain torch: the tiles and numbers of reference.py in bounded memory.

Nothing of size Sq x Sk is ever allocated, and tiles that are not kept are not computed. One query tile meets
its kept K tiles in chunks: two matrix products and a few passes over a [128, 2048] buffer per chunk.
Departures from the text of reference.py, none from its numbers beyond fp32 rounding:

- Codes are multiplied back by their scales once per head, so a chunk needs one product and no rescaling.
- The weights of a chunk are taken relative to the running maximum at its end, not tile by tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparge_kernels.cpu import threads
from sparge_kernels.predict import finite_tiles, select_tiles
from sparge_kernels.quantize import quantize_rows, quantize_tiles
from sparge_kernels.reference import spread_non_finite
from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import split_tiles

CHUNK_TILES = 32  # 2048 keys: the [128, 2048] fp32 score buffer stays in a core's L2 cache


@dataclass(frozen=True)
class _Keys:
    """K and V of one head in tiles, fp32. Only `codes` differs from k, and only when quantized."""

    codes: Tensor  # [nK, 64, D], dequantized and centred; k itself without quantization
    means: Tensor | None  # [nK, D], what the centring took away
    raw: Tensor  # [nK, 64, D]
    values: Tensor  # [nK, 64, Dv], non-finite numbers replaced by 0
    raw_values: Tensor  # [nK, 64, Dv]
    exact: Tensor  # bool [nK], tiles INT8 cannot hold
    finite_values: Tensor  # bool [nK]
    any_exact: bool
    all_finite: bool
    length: int


@dataclass(frozen=True)
class _Head:
    """One query head, ready for its query tiles."""

    codes: Tensor  # [Sq, D], dequantized, times the scale
    raw: Tensor  # [Sq, D], times the scale
    exact: Tensor  # bool [Sq], rows INT8 cannot hold
    keys: _Keys
    kept: Tensor  # bool [nQ, nK]
    is_causal: bool
    skip_below: float
    out: Tensor  # [Sq, Dv]


@dataclass(frozen=True)
class _Queries:
    """One query tile, fp32, multiplied by the scale."""

    codes: Tensor  # [rows, D], dequantized
    raw: Tensor  # [rows, D]
    exact: Tensor | None  # bool [rows], rows INT8 cannot hold; None if there are none


class _Softmax:
    """Running state of one query tile's online softmax: maximum m, denominator l and numerator."""

    def __init__(self, rows: int, value_dim: int, device: torch.device) -> None:
        self.maximum = torch.full((rows, 1), -torch.inf, dtype=torch.float32, device=device)
        self.mass = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self.values = torch.zeros(rows, value_dim, dtype=torch.float32, device=device)
        self.skipped = 0

    def output(self) -> Tensor:
        return self.values / self.mass.masked_fill(self.mass == 0, 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Sequence[Thresholds],
    is_causal: bool,
    scale: float,
    precision: str,
    predictor: str,
    out: Tensor,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes the attention of q [B, Hq, Sq, D] over k, v [B, Hkv, Sk, D / Dv] to out [B, Hq, Sq, Dv].

    One threshold entry per query head; any strides; no empty tensors. Query head h reads kv head
    h // (Hq // Hkv). Returns density and pv_skipped, fp32 [B, Hq]; writes stage 1's map to `kept`, bool
    [B, Hq, nQ, nK], if it is given.
    """
    group = q.shape[1] // k.shape[1]
    density, pv_skipped = (torch.empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
    kv_heads = [(b, h) for b in range(k.shape[0]) for h in range(k.shape[1])]
    together = torch.get_num_threads()  # fp32 copies of this many heads of K and V exist at a time
    for start in range(0, len(kv_heads), together):
        some = kv_heads[start : start + together]
        keys = threads.run([partial(_prepare_keys, k[at], v[at], precision) for at in some])
        q_heads = [(b, h * group + i, own) for (b, h), own in zip(some, keys, strict=True) for i in range(group)]
        heads = threads.run(
            [
                partial(_prepare_head, q[b, h], own, thresholds[h], is_causal, scale, precision, predictor, out[b, h])
                for b, h, own in q_heads
            ]
        )
        jobs = [partial(_query_tile, head, i) for head in heads for i in reversed(range(len(head.kept)))]
        counts = iter(threads.run(jobs))
        for (b, h, _), head in zip(q_heads, heads, strict=True):
            visible, skipped = (sum(n) for n in zip(*itertools.islice(counts, len(head.kept)), strict=True))
            computed = int(head.kept.sum())
            if kept is not None:
                kept[b, h] = head.kept
            density[b, h] = computed / visible
            pv_skipped[b, h] = skipped / computed
    return density, pv_skipped


def _prepare_keys(k: Tensor, v: Tensor, precision: str) -> _Keys:
    """Tiles of one head from k [Sk, D] and v [Sk, Dv]."""
    k, v = _fp32(k), _fp32(v)
    raw, raw_values = split_tiles(k, K_TILE), split_tiles(v, K_TILE)
    finite_values = finite_tiles(v, K_TILE)
    all_finite = bool(finite_values.all())
    values = raw_values if all_finite else torch.where(raw_values.isfinite(), raw_values, 0)
    codes, means, exact = raw, None, torch.zeros(len(raw), dtype=torch.bool)
    if precision == "int8":
        tiles = quantize_tiles(k)
        codes, means, exact = tiles.codes * tiles.scale[:, None, None], tiles.mean, tiles.exact
    return _Keys(codes, means, raw, values, raw_values, exact, finite_values, bool(exact.any()), all_finite, len(k))


def _prepare_head(
    q: Tensor,
    keys: _Keys,
    thresholds: Thresholds,
    is_causal: bool,
    scale: float,
    precision: str,
    predictor: str,
    out: Tensor,
) -> _Head:
    """Stage 1 and quantization of one query head, q [Sq, D] to out [Sq, Dv]."""
    q = _fp32(q)
    k, v = (x.flatten(0, 1)[None, None, : keys.length] for x in (keys.raw, keys.raw_values))
    kept = select_tiles(
        q[None, None], k, v, thresholds=[thresholds], is_causal=is_causal, scale=scale, predictor=predictor
    )[0, 0]
    codes = raw = q * scale
    exact = torch.zeros(len(q), dtype=torch.bool)
    if precision == "int8":
        rows = quantize_rows(q)
        codes, exact = rows.codes * (rows.scale * scale)[:, None], rows.exact
    return _Head(codes, raw, exact, keys, kept, is_causal, thresholds.skip_below(keys.length), out)


def _query_tile(head: _Head, i: int) -> tuple[int, int]:
    """Writes one query tile of the output; counts the K tiles it sees and those whose P V it skipped."""
    keys = head.keys
    rows = slice(i * Q_TILE, min((i + 1) * Q_TILE, len(head.raw)))
    exact = head.exact[rows]
    queries = _Queries(head.codes[rows], head.raw[rows], exact if exact.any() else None)
    past, end = _causal_split(rows, keys.length) if head.is_causal else (len(keys.raw),) * 2
    tiles = head.kept[i, :past].nonzero().flatten()
    state = _Softmax(len(queries.raw), head.out.shape[-1], queries.raw.device)
    for start in range(0, len(tiles), CHUNK_TILES):
        _past_chunk(queries, keys, tiles[start : start + CHUNK_TILES], state, head.skip_below)
    if end > past:
        _diagonal_chunk(queries, keys, range(past, end), rows.start, state)
    head.out[rows] = state.output()
    return end, state.skipped


def _causal_split(rows: slice, k_len: int) -> tuple[int, int]:
    """K tiles wholly before the query tile, and K tiles it sees at all."""
    past = -(-k_len // K_TILE) if k_len <= rows.start else rows.start // K_TILE
    return past, -(-min(rows.stop, k_len) // K_TILE)


def _past_chunk(queries: _Queries, keys: _Keys, tiles: Tensor, state: _Softmax, skip_below: float) -> None:
    """Stage 2 over the K tiles `tiles` (ascending, [n]), every key of which every row sees."""
    scores, offsets = _scores(queries, keys, tiles)
    ragged = keys.length % K_TILE
    if ragged and int(tiles[-1]) == len(keys.raw) - 1:
        scores[:, -1, ragged:] = -torch.inf
    tile_max = scores.amax(-1) if offsets is None else scores.amax(-1) + offsets
    running = torch.maximum(tile_max.cummax(-1).values, state.maximum)
    new_max = running[:, -1:]
    gap = tile_max - running
    gap = gap.masked_fill_(gap.isnan(), -torch.inf).amax(0)
    skip = (gap < skip_below) & _take(keys.finite_values, tiles)

    base = new_max.masked_fill(new_max == -torch.inf, 0)
    shift = -base if offsets is None else offsets - base
    weights = scores.add_(shift[..., None]).exp_()
    _advance(state, new_max, base, weights.flatten(1))
    if skip.any():
        state.skipped += int(skip.sum())
        taken = (~skip).nonzero().flatten()
        weights, tiles = weights.index_select(1, taken), tiles[taken]
    if len(tiles):
        _add_values(state, weights.flatten(1), keys, tiles, visible=None)


def _diagonal_chunk(queries: _Queries, keys: _Keys, tiles: range, first_row: int, state: _Softmax) -> None:
    """The causal diagonal: plain fp32 scores, nothing skipped. `first_row` is the tile's first query."""
    rows, start, stop = len(queries.raw), tiles.start * K_TILE, min(tiles.stop * K_TILE, keys.length)
    visible = torch.arange(start, tiles.stop * K_TILE) <= torch.arange(first_row, first_row + rows)[:, None]
    visible[:, stop - start :] = False
    scores = queries.raw @ keys.raw[tiles.start : tiles.stop].flatten(0, 1).T
    scores.masked_fill_(~visible, -torch.inf)
    new_max = torch.maximum(scores.amax(-1, keepdim=True), state.maximum)
    base = new_max.masked_fill(new_max == -torch.inf, 0)
    weights = scores.sub_(base).exp_()
    _advance(state, new_max, base, weights)
    _add_values(state, weights, keys, torch.arange(tiles.start, tiles.stop), visible)


def _scores(queries: _Queries, keys: _Keys, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores [rows, n, 64] of a query tile and K tiles, less q . m_j [rows, n] if K is centred."""
    scores = _product(queries.codes, keys.codes, tiles)
    if keys.means is None:
        return scores, None
    offsets = queries.raw @ _take(keys.means, tiles).T
    if keys.any_exact or queries.exact is not None:
        exact = _take(keys.exact, tiles)[None, :]
        if queries.exact is not None:
            exact = exact | queries.exact[:, None]
        scores = torch.where(exact[..., None], _product(queries.raw, keys.raw, tiles), scores)
        offsets = torch.where(exact, 0, offsets)
    return scores, offsets


def _product(queries: Tensor, keys: Tensor, tiles: Tensor) -> Tensor:
    """[rows, D] times the chosen tiles of [nK, 64, D]: [rows, n, 64]."""
    return (queries @ _take(keys, tiles).flatten(0, 1).T).unflatten(1, (len(tiles), K_TILE))


def _advance(state: _Softmax, new_max: Tensor, base: Tensor, weights: Tensor) -> None:
    """Moves the state to a new maximum and adds the weights [rows, keys] to the denominator."""
    decay = (state.maximum - base).exp_()
    state.mass.mul_(decay).add_(weights.sum(-1, keepdim=True))
    state.values.mul_(decay)
    state.maximum = new_max


def _add_values(state: _Softmax, weights: Tensor, keys: _Keys, tiles: Tensor, visible: Tensor | None) -> None:
    """Adds weights [rows, keys] @ V of the tiles to the numerator."""
    state.values.addmm_(weights, _take(keys.values, tiles).flatten(0, 1))
    if not (keys.all_finite or bool(_take(keys.finite_values, tiles).all())):
        if visible is None:
            visible = torch.ones_like(weights, dtype=torch.bool)
        raw_values = _take(keys.raw_values, tiles).flatten(0, 1)
        state.values = spread_non_finite(state.values, weights, raw_values, visible)


def _fp32(x: Tensor) -> Tensor:
    """x as contiguous fp32; a copy only where it is not."""
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def _take(x: Tensor, tiles: Tensor) -> Tensor:
    """Rows of x named by the ascending indices: a view if they are contiguous, else a copy."""
    first, last = int(tiles[0]), int(tiles[-1])
    if last - first + 1 == len(tiles):
        return x[first : last + 1]
    return x.index_select(0, tiles)
