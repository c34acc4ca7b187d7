"""What each candidate of thresholds would cost and lose at one attention call, from one exact look at a few tiles.

The paper runs the kernel anew for every candidate. Here a query tile's softmax numerators are kept apart per K tile, so
the output of every candidate is a sum over the K tiles it keeps: one product with a matrix of zeros and ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparge_kernels.masks import additive_mask
from sparge_kernels.predict import predict
from sparge_kernels.quantize import quantize_rows, quantize_tiles
from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import split_tiles, tile_count

# A step of these moves the density by some percent. cdf, not topk: it follows inputs that were not calibrated on.
_CDF = (
    *(0.01, 0.2, 0.4, 0.5, 0.6, 0.67, 0.73, 0.78, 0.82, 0.85, 0.88),
    *(0.9, 0.92, 0.935, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999),
)
# "clusters" knows what single keys of a tile offer, and rarely gains from a theta above 0.
_SIMILARITY = {"clusters": (0.0, 0.3), "sparge": (0.3, 0.5, 0.7)}
SAMPLED_TILES = 12
MARGIN = 0.9
"""Share of the budget that a candidate may use by the estimate: the rows that were not looked at may be worse."""


@dataclass(frozen=True)
class Call:
    """One attention call as it ran: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D / Dv], dense its output.

    attn_mask: bool or query's dtype, [B or 1, Hq or 1, Sq or 1, Sk or 1].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    dense: Tensor
    is_causal: bool
    scale: float
    precision: str
    attn_mask: Tensor | None = None

    def mask_of(self, batch: int, heads: slice) -> Tensor | None:
        """The mask of some heads of a batch entry, to be added to the scores, fp32 [1, heads or 1, Sq, Sk]."""
        if self.attn_mask is None:
            return None
        mask = additive_mask(self.attn_mask, torch.float32)
        mask = mask.expand(self.query.shape[0], -1, self.query.shape[2], self.key.shape[2])[batch, None]
        return mask if mask.shape[1] == 1 else mask[:, heads]


@dataclass
class Sums:
    """What the candidates did at one site, summed over calls; fp64 on the CPU, [Hq, C], or [Hq] where no C is named.

    error: sum|o - o_dense| of each candidate. total: sum|o_dense|. worst: least cosine of a row, of each candidate.
    kept: tiles kept by each candidate, of `visible`.
    """

    error: Tensor
    total: Tensor
    worst: Tensor
    kept: Tensor
    visible: Tensor

    @classmethod
    def zero(cls, heads: int, count: int) -> Sums:
        """Of no call."""
        error, kept = (torch.zeros(heads, count, dtype=torch.float64) for _ in range(2))
        total, visible = (torch.zeros(heads, dtype=torch.float64) for _ in range(2))
        return cls(error, total, torch.ones_like(error), kept, visible)

    def add(self, other: Sums) -> None:
        """Adds another call's."""
        for name in ("error", "total", "kept", "visible"):
            getattr(self, name).add_(getattr(other, name))
        self.worst = torch.minimum(self.worst, other.worst)  # NaN wins

    def to_json(self) -> dict[str, list[float] | list[list[float]]]:
        return {name: getattr(self, name).tolist() for name in ("error", "total", "worst", "kept", "visible")}

    @classmethod
    def from_json(cls, content: dict[str, list[float]]) -> Sums:
        return cls(**{name: torch.tensor(values, dtype=torch.float64) for name, values in content.items()})


def candidates(predictor: str, pv: float | None) -> tuple[Thresholds, ...]:
    """The thresholds that are tried; the last keeps everything. pv: stage 2's, the same for all."""
    grid = [Thresholds(None, cdf, theta, pv) for theta in _SIMILARITY[predictor] for cdf in _CDF]
    return (*grid, Thresholds(1.0, 1.0, 1.0, pv))


def sampled_tiles(q_len: int) -> list[int]:
    """Query tiles to look at: evenly spread, the last among them."""
    count = tile_count(q_len, Q_TILE)
    number = min(count, SAMPLED_TILES)
    return sorted({count - 1 - (count * i) // number for i in range(number)})


def measure(call: Call, tried: Sequence[Thresholds], predictor: str, rows_at_a_time: int = Q_TILE) -> Sums:
    """Every candidate at the sampled query tiles of a call, all its batch entries and heads.

    Temporary memory: one head in fp32, and a few times rows_at_a_time x Sk. Stage 2 is left out. Scores are quantized
    as the kernels do that centre each K tile by its own mean (reference.py, 2.); the others differ by rounding.
    """
    heads, group = call.query.shape[1], call.query.shape[1] // call.key.shape[1]
    tiles = torch.tensor(sampled_tiles(call.query.shape[2]), device=call.query.device)
    sums = Sums.zero(heads, len(tried))
    for batch in range(call.query.shape[0]):
        for kv_head in range(call.key.shape[1]):
            k, v = (x[batch, kv_head].float() for x in (call.key, call.value))
            keys = _Keys(k, v, call.precision)
            q_heads = range(kv_head * group, (kv_head + 1) * group)
            q = call.query[batch, q_heads.start : q_heads.stop].float()
            mask = call.mask_of(batch, slice(q_heads.start, q_heads.stop))
            options: dict[str, Any] = {
                "is_causal": call.is_causal,
                "scale": call.scale,
                "mask": mask,
                "predictor": predictor,
                "q_tiles": tiles,
            }
            prediction = predict(q[None], k[None, None], v[None, None], **options)
            for i, head in enumerate(q_heads):
                kept = torch.cat([prediction.keep(i, one) for one in tried])  # [C, n, nK]
                visible = (prediction.whole[:, i] | prediction.partial[:, i]).sum()
                sums.kept[head] += kept.sum((1, 2)).cpu()
                sums.visible[head] += visible.cpu()
                own = None if mask is None else mask[0, min(i, mask.shape[1] - 1)]
                for number, tile in enumerate(tiles.tolist()):
                    partial = prediction.partial[0, i, number]
                    partial = partial[: _seen_tiles(partial | prediction.whole[0, i, number])]
                    for rows in _pieces(tile, q.shape[1], rows_at_a_time):
                        added = _added(call, own, rows, len(partial))
                        output = _outputs(q[i, rows], keys, kept[:, number], partial, added, call.scale)
                        _add_rows(sums, head, output, call.dense[batch, head, rows])
    return sums


def _seen_tiles(seen: Tensor) -> int:
    """How many tiles there are up to the last that is seen, at least one."""
    found = seen.nonzero()
    return int(found[-1]) + 1 if len(found) else 1


def compare(output: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum|o - o_dense|, sum|o_dense|, least cosine of a row) over the last two dimensions of [..., rows, Dv].

    Two rows of zeros are equal; a row of zeros and another are as unlike as can be told: cosine 0.
    """
    # Rounded as the kernel's output is: the dense one was.
    output, dense = output.to(dense.dtype).float(), dense.float()
    error = (output - dense).abs().sum((-2, -1))
    norm, dense_norm = torch.linalg.vector_norm(output, dim=-1), torch.linalg.vector_norm(dense, dim=-1)
    cosine = (output * dense).sum(-1) / (norm * dense_norm).clamp(min=torch.finfo(torch.float32).tiny)
    both_zero = (norm == 0) & (dense_norm == 0)
    return error, dense.abs().sum((-2, -1)), cosine.masked_fill(both_zero, 1).clamp(max=1).amin(-1)


class _Keys:
    """K and V of one head, ready for products: fp32, in tiles, the ragged tail padded."""

    def __init__(self, k: Tensor, v: Tensor, precision: str) -> None:
        self.length = len(k)
        self.raw = split_tiles(k, K_TILE)  # [nK, 64, D]
        self.values = split_tiles(v, K_TILE)
        self.quantized = quantize_tiles(k) if precision == "int8" else None
        if self.quantized is not None:
            self.codes = self.quantized.codes * self.quantized.scale[:, None, None]

    def scores(self, q: Tensor, exact: Tensor, scale: float) -> Tensor:
        """Scores of q [R, D] with the first tiles, as many as `exact` bool [n] has, [R, n, 64]; those unquantized."""
        count = len(exact)
        raw = self.raw[:count]
        if self.quantized is None:
            return _product(q, raw) * scale
        rows = quantize_rows(q)
        scores = _product(rows.codes * rows.scale[:, None], self.codes[:count])
        scores += (q @ self.quantized.mean[:count].T)[..., None]
        tiles = (exact | self.quantized.exact[:count]).nonzero().flatten()
        if len(tiles):
            scores[:, tiles] = _product(q, raw[tiles])
        if rows.exact.any():
            scores[rows.exact] = _product(q[rows.exact], raw)
        return scores * scale


def _product(q: Tensor, tiles: Tensor) -> Tensor:
    return (q @ tiles.flatten(0, 1).T).unflatten(1, tiles.shape[:2])


def _outputs(q: Tensor, keys: _Keys, kept: Tensor, partial: Tensor, added: Tensor, scale: float) -> Tensor:
    """The output of every candidate for rows q [R, D] of one query tile, [C, R, Dv]; kept [C, nK] bool.

    partial: bool [n], which of the first n tiles are looked at key by key; the others behind them nobody sees.
    added: [R, n * 64], to be added to the scores.
    """
    count = len(partial)
    scores = keys.scores(q, partial, scale)
    scores += added.unflatten(1, (count, K_TILE))
    largest = scores.amax((1, 2), keepdim=True)
    weights = scores.sub_(largest.masked_fill(largest == -torch.inf, 0)).exp_()  # [R, n, 64]
    parts = weights.transpose(0, 1) @ keys.values[:count]  # [n, R, Dv]
    chosen = kept[:, :count].to(weights.dtype)  # [C, n]
    numerators = (chosen @ parts.flatten(1)).unflatten(1, parts.shape[1:])
    mass = chosen @ weights.sum(-1).T  # [C, R]
    return numerators / mass.masked_fill(mass == 0, 1)[..., None]


def _added(call: Call, mask: Tensor | None, rows: slice, count: int) -> Tensor:
    """What is added to the scores of some rows with the first `count` tiles, [R, count * 64]: 0, -inf, a float mask."""
    k_len = call.key.shape[2]
    position = torch.arange(count * K_TILE, device=call.key.device)
    if mask is not None:
        own = mask[rows, : len(position)]
        return torch.nn.functional.pad(own, (0, len(position) - own.shape[1]), value=-torch.inf)
    hidden = (position >= k_len)[None]
    if call.is_causal:
        hidden = hidden | (position > torch.arange(rows.start, rows.stop, device=position.device)[:, None])
    return torch.zeros(1, len(position), device=position.device).masked_fill(hidden, -torch.inf)


def _pieces(tile: int, q_len: int, rows_at_a_time: int) -> list[slice]:
    start, stop = tile * Q_TILE, min((tile + 1) * Q_TILE, q_len)
    return [slice(first, min(first + rows_at_a_time, stop)) for first in range(start, stop, rows_at_a_time)]


def _add_rows(sums: Sums, head: int, output: Tensor, dense: Tensor) -> None:
    error, total, worst = compare(output, dense)
    sums.error[head] += error.cpu()
    sums.total[head] += total.cpu()
    sums.worst[head] = torch.minimum(sums.worst[head], worst.cpu().double())


def ladders(sums: Sums, max_error: float, min_row_cosine: float) -> list[list[int]]:
    """Per head the candidates to try, the sparsest that seems to fit first, then ever more careful ones.

    A later one is denser and has a smaller error; the last keeps everything, and is alone where none seems to fit.
    """
    found = []
    keep_all = sums.error.shape[1] - 1
    for error, total, worst, kept in zip(sums.error, sums.total, sums.worst, sums.kept, strict=True):
        fits = (error <= MARGIN * max_error * total) & (worst >= min_row_cosine)
        order = sorted(range(keep_all), key=lambda c: (float(kept[c]), float(error[c])))
        ladder: list[int] = []
        for one in order:
            better = not ladder or (error[one] < error[ladder[-1]] and kept[one] > kept[ladder[-1]])
            if bool(fits[one]) and better and kept[one] < kept[keep_all]:
                ladder.append(one)
        found.append([*ladder, keep_all])
    return found
