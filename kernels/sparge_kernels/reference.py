"""The specification of `sparge::attention` in plain torch: every kernel is tested against this file.

SpargeAttn (arXiv 2502.18137) with SageAttention's INT8 product (2410.02367). Memory is O(Sq * Sk).
Where it departs from the papers, it does so for a reason:

1. All arithmetic is fp32 (fp64 for fp64 inputs): in bf16 the proxy's softmax and cumsum lose the tail that
   `cdf` asks about. `scale` is the caller's, in the prediction too; its default is 1/sqrt(D) of the given D.
2. Q has one INT8 scale per row and K one per tile after subtracting the tile's own mean m_j, and the exact
   product is restored: S = scale * (q_scale * k_scale * (q8 . k8) + q . m_j). This needs one pass over K, and
   no output row depends on a later key, not even through a scale, a mean or a tile choice: change a
   future key or value and no earlier output changes by one bit. For the same reason diagonal tiles under
   causal are not quantized; nor is a tile or row INT8 cannot hold (inf, NaN), which spoils no other.
   (A future *query* of the same 128-row tile may change which tiles the row keeps; never the values of
   what is kept.) So it is with centring="tile", which the CPU kernels follow. With "call", which the GPU kernels
   follow, one vector c per head takes the place of m_j (quantize.shared_centre): q . c is then one number per row and
   costs nothing in the loop. And a loop of matrix instructions should not stop to look: whatever is not a plain
   quantized tile (diagonal, ragged, under a bias, one that INT8 cannot hold, non-finite V) is exact as a whole and
   comes after the others.
3. K tiles are centred before their self-similarity by the mean of all keys, under causal by the mean of the
   keys up to the end of the tile, which looks at nothing later. Tile 0, where attention sinks live, then has
   no similarity left and is always kept (for theta > 0). Q is not centred: a common offset of all queries
   does change the scores. Padding takes no part in anything. Kept without asking: tiles of low
   similarity, diagonal tiles, and tiles with a non-finite number. The kept mass reaches tau (the public code stops
   below it), so every row keeps at least one tile.
4. Stage 2 counts a skipped tile's exp-sum in the denominator, as the paper does. Certificate: a skipped tile
   has exp(s - m_final) <= exp(s - m_new) < exp(lambda) for each of its keys, and the denominator is at
   least 1, so with lambda = ln(eps / N) the at most N skipped keys of a row hold at most eps of its softmax mass,
   for any input. Diagonal tiles and tiles with a non-finite V are not skipped.
5. A mask is kept to exactly: tiles it hides are never visited, tiles it cuts are treated as the diagonal (masks.py).
6. Non-finite input gives NaN only where `F.scaled_dot_product_attention` gives NaN, and never to a row that
   cannot see it. A row whose scores are all -inf gives 0, as SDPA does.
7. Stage 1 is the paper's with predictor="sparge". With "clusters", the default, no query is pooled and each K tile is
   represented by clusters of its keys (clusters.py): 3. and the certificate are the same, tau is the predicted mass
   that every row keeps, and theta is asked of K tiles only. Of a causal query tile, candidates are tiles before its
   first row alone, so no later key has a part in its choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparge_kernels.masks import additive_mask, causal_tiles, mask_tiles
from sparge_kernels.predict import finite_tiles, select_tiles, tile_means
from sparge_kernels.quantize import quantize_rows, quantize_tiles, shared_centre
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import split_tiles, tile_lengths


@dataclass(frozen=True)
class Output:
    """output [B, Hq, Sq, Dv] in q's dtype; the rest describes what was computed.

    density: computed / visible tiles, fp32 [B, Hq] (1 where nothing is visible).
    pv_skipped: share of the computed tiles whose P V stage 2 skipped, fp32 [B, Hq].
    kept: stage 1's map, bool [B, Hq, nQ, nK].
    dropped_mass: share of each row's kept softmax mass that stage 2 dropped, [B, Hq, Sq].
    lse: ln of the sum of exp(score) over the kept keys of each row, [B, Hq, Sq]; -inf where there are none.
    """

    output: Tensor
    density: Tensor
    pv_skipped: Tensor
    kept: Tensor
    dropped_mass: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    thresholds: Sequence[Thresholds],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    precision: str = "int8",
    centring: str = "tile",
    predictor: str = DEFAULT_PREDICTOR,
) -> Output:
    """Sparse attention of q [B, Hq, Sq, D] over k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv].

    One threshold entry, or one per query head. `precision`: "int8" or "none". Causal is top-left aligned.
    `centring`: "tile" or "call", see 2. above. `predictor`: "clusters" or "sparge", see 7. above.
    attn_mask: bool or float, broadcast to [B, Hq, Sq, Sk], not with is_causal (masks.py).
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    if group != 1 and not enable_gqa:
        raise ValueError(f"{heads} query heads over {k.shape[1]} kv heads need enable_gqa=True.")
    per_head = list(thresholds) * (heads if len(thresholds) == 1 else 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = q.to(dtype), k.to(dtype), v.to(dtype)

    mask = None if attn_mask is None else additive_mask(attn_mask, dtype)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "mask": mask, "predictor": predictor}
    kept = select_tiles(q_wide, k_wide, v_wide, thresholds=per_head, **options)
    if mask is None:
        tiles = causal_tiles(q.shape[-2], k.shape[-2], is_causal, dtype, q.device)
    else:
        mask = mask.expand(q.shape[0], heads, q.shape[-2], k.shape[-2])
        tiles = mask_tiles(mask)
    k_wide, v_wide = (x.repeat_interleave(group, dim=1) for x in (k_wide, v_wide))
    centre, exact, later = None, tiles.partial, torch.zeros_like(kept)
    if centring == "call":
        centre = shared_centre(k_wide, is_causal)
        unquantized = unquantized_tiles(k_wide, v_wide, precision, centre)
        exact = later = tiles.partial | tiles.biased | unquantized[..., None, :]
    scores = attention_scores(q_wide, k_wide, exact=exact, scale=scale, precision=precision, centre=centre)
    scores = scores if mask is None else scores + mask
    visible = visible_pairs(q.shape[-2], k.shape[-2], is_causal, q.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    lambdas = torch.tensor([t.skip_below(k.shape[-2]) for t in per_head], dtype=dtype, device=q.device)
    output, skipped, dropped_mass, lse = softmax_values(scores, v_wide, kept, lambdas, tiles.partial, visible, later)

    visible_count = (~tiles.hidden).sum((-2, -1))
    computed = kept.sum((-2, -1))
    density = torch.where(visible_count > 0, computed / visible_count, 1).float()
    pv_skipped = (skipped.sum((-2, -1)) / computed.clamp(min=1)).float()
    return Output(output.to(q.dtype), density, pv_skipped, kept, dropped_mass, lse)


def unquantized_tiles(k: Tensor, v: Tensor, precision: str, centre: Tensor) -> Tensor:
    """Bool [B, H, nK]: K tiles that are exact with centring="call", whatever the mask."""
    held = finite_tiles(k, K_TILE) & tile_means(k, K_TILE).isfinite().all(-1) & finite_tiles(v, K_TILE)
    held = held & (tile_lengths(k.shape[-2], K_TILE, k.device) == K_TILE)
    return ~held | quantize_tiles(k, centre).exact if precision == "int8" else ~held


def attention_scores(
    q: Tensor, k: Tensor, *, exact: Tensor, scale: float, precision: str, centre: Tensor | None = None
) -> Tensor:
    """Scores of every pair in nats [B, H, Sq, Sk]; those of `exact` tiles [..., nQ, nK] are never quantized.

    K tiles are centred by `centre` [B, H, D], or each by its own mean.
    """
    q_len, k_len = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-1, -2)
    if precision == "int8":
        rows, tiles = quantize_rows(q), quantize_tiles(k, centre)
        codes = tiles.codes.flatten(-3, -2)[..., :k_len, :]
        product = rows.codes.to(q.dtype) @ codes.to(q.dtype).transpose(-1, -2)  # exact: 127 * 127 * 256 < 2^24
        scales = rows.scale[..., None] * _per_key(tiles.scale, k_len)[..., None, :]
        restored = product * scales + _per_key(q @ tiles.mean.transpose(-1, -2), k_len)
        pairs = _per_key(_per_query(exact, q_len), k_len)
        pairs = pairs | rows.exact[..., None] | _per_key(tiles.exact, k_len)[..., None, :]
        scores = torch.where(pairs, scores, restored)
    return scores * scale


def softmax_values(
    scores: Tensor, v: Tensor, kept: Tensor, lambdas: Tensor, partial: Tensor, visible: Tensor, later: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage 2: online softmax over the kept tiles in ascending order, skipping P V below lambda.

    scores [B, H, Sq, Sk], v [B, H, Sk, Dv], kept [B, H, nQ, nK], lambdas [H] in nats. `partial` [..., nQ, nK] tiles
    are not skipped; `later` [..., nQ, nK] ones come after the others; `visible` [Sq, Sk]: what causality shows.
    Returns the output [B, H, Sq, Dv], the skipped tiles [B, H, nQ, nK], the dropped mass and the lse [B, H, Sq].
    """
    q_len, k_len = scores.shape[-2:]
    finite_v = finite_tiles(v, K_TILE)
    exempt = partial | ~finite_v[..., None, :]
    skipped = torch.zeros_like(kept)
    row_max = scores.new_full(scores.shape[:-1], -torch.inf)  # m
    mass, dropped = scores.new_zeros(scores.shape[:-1]), scores.new_zeros(scores.shape[:-1])  # l, part of l
    values = v.new_zeros(*scores.shape[:-1], v.shape[-1])
    for after, j in itertools.product((False, True), range(kept.shape[-1])):
        now = kept[..., j] & (later[..., j] == after)
        if not now.any():
            continue
        keys = slice(j * K_TILE, min((j + 1) * K_TILE, k_len))
        kept_rows = _per_query(now[..., None], q_len)  # [B, H, Sq, 1]
        tile = scores[..., keys].masked_fill(~kept_rows, -torch.inf)
        tile_max = tile.amax(-1)
        new_max = torch.maximum(row_max, tile_max)
        # A row that has seen only -inf has no maximum to subtract: exp(-inf - 0) is the 0 that is wanted.
        base = new_max.masked_fill(new_max == -torch.inf, 0)
        weights, decay = (tile - base[..., None]).exp(), (row_max - base).exp()

        gap = tile_max - new_max
        gap = gap.masked_fill(gap.isnan(), -torch.inf)  # a NaN row, or nothing seen yet: no reason to compute
        tile_gap = split_tiles(gap[..., None], Q_TILE, fill=-torch.inf).amax((-2, -1))  # [B, H, nQ]
        skipped_now = now & ~exempt[..., j] & (tile_gap < lambdas[:, None])
        skipped[..., j] |= skipped_now
        skipped_rows = _per_query(skipped_now[..., None], q_len)  # [B, H, Sq, 1]

        product = weights @ torch.where(v[..., keys, :].isfinite(), v[..., keys, :], 0)
        if not finite_v[..., j].all():
            product = spread_non_finite(product, weights, v[..., keys, :], visible[:, keys] & kept_rows)
        values = values * decay[..., None] + product.masked_fill(skipped_rows, 0)
        mass = mass * decay + weights.sum(-1)
        dropped = dropped * decay + weights.sum(-1).masked_fill(~skipped_rows[..., 0], 0)
        row_max = new_max
    lse = row_max + mass.log()
    mass = mass.masked_fill(mass == 0, 1)
    return values / mass[..., None], skipped, dropped / mass, lse


def spread_non_finite(values: Tensor, weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Adds to values [..., q, Dv] what the non-finite numbers of v [..., k, Dv] add to weights [..., q, k] @ v.

    0 * inf is NaN, so a plain product would hand a masked key's infinity to rows that must not know of it.
    `visible` [..., q, k] says who does.
    """

    def meets(pairs: Tensor, numbers: Tensor) -> Tensor:
        return (pairs & visible).to(v.dtype) @ numbers.to(v.dtype) > 0

    attended = weights != 0  # true for NaN weights, whose rows are NaN already
    values = torch.where(meets(attended, v == torch.inf), values + torch.inf, values)
    values = torch.where(meets(attended, v == -torch.inf), values - torch.inf, values)
    return values.masked_fill(meets(~attended, v.isinf()) | meets(visible, v.isnan()), torch.nan)


def visible_pairs(q_len: int, k_len: int, is_causal: bool, device: torch.device) -> Tensor:
    """Bool [Sq, Sk]: the query may attend to the key (top-left aligned)."""
    pairs = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    return pairs.tril() if is_causal else pairs


def _per_query(tiles: Tensor, q_len: int) -> Tensor:
    """[..., nQ, x] -> [..., Sq, x]."""
    return tiles.repeat_interleave(Q_TILE, dim=-2)[..., :q_len, :]


def _per_key(tiles: Tensor, k_len: int) -> Tensor:
    """[..., nK] -> [..., Sk]."""
    return tiles.repeat_interleave(K_TILE, dim=-1)[..., :k_len]
