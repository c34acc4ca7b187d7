"""The native kernel and the reference with all they can tell, and how close the two must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from kernel_cases import kernel_error, run_native
from torch import Tensor

from sparge_kernels import predict, reference
from sparge_kernels.cpu import native
from sparge_kernels.masks import additive_mask
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, K_TILE, Q_TILE, Thresholds
from sparge_kernels.tiles import tile_count

HUGE = 1e20
TAU_ROUNDING = 1e-5  # sums of some hundred fp32 weights
OUTPUT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Stages:
    """Output and statistics of the operator, and stage 1's map, bool [B, Hq, nQ, nK]."""

    output: Tensor
    density: Tensor
    pv_skipped: Tensor
    kept: Tensor


def native_stages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Sequence[Thresholds],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    precision: str = "int8",
    predictor: str = DEFAULT_PREDICTOR,
) -> Stages:
    """The native kernel into an output that starts as NaN."""
    heads = q.shape[1]
    output = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype)
    tiles = (tile_count(q.shape[2], Q_TILE), tile_count(k.shape[2], K_TILE))
    kept = torch.zeros(*q.shape[:2], *tiles, dtype=torch.bool)
    density, pv_skipped = native.attention(
        q,
        k,
        v,
        thresholds=list(thresholds) * (heads if len(thresholds) == 1 else 1),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        precision=precision,
        predictor=predictor,
        out=output,
        kept=kept,
    )
    return Stages(output, density, pv_skipped, kept)


def reference_stages(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **options: object
) -> reference.Output:
    return reference.attention(q, k, v, thresholds=thresholds, enable_gqa=True, **options)


def assert_same_stages(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], precision: str = "int8", **options: object
) -> Stages:
    """Runs both: the same tiles, the same share of them skipped, and numbers that differ by rounding only."""
    actual = native_stages(q, k, v, thresholds, precision=precision, **options)
    expected = reference_stages(q, k, v, thresholds, precision=precision, **options)
    error = (actual.output.double() - expected.output.double()).abs()
    assert error.sum() <= 1e-2 * expected.output.double().abs().sum() + 1e-6
    if not torch.equal(actual.kept, expected.kept):
        assert_rounding_decides(actual.kept, q, k, v, thresholds, **options)
        return actual
    assert torch.equal(actual.density, expected.density)
    torch.testing.assert_close(actual.pv_skipped, expected.pv_skipped)
    magnitude = reference_stages(q, k, v.abs(), thresholds, precision=precision, **options).output.double()
    rounding = 2 * OUTPUT_ROUNDING[q.dtype] * expected.output.double().abs()
    assert (error <= kernel_error(run_native, q.dtype, precision) * magnitude + rounding + 1e-7).all()
    return actual


def assert_rounding_decides(
    kept: Tensor, q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **options: object
) -> None:
    """The map is not the reference's, and rounding is the reason."""
    if options.get("predictor", DEFAULT_PREDICTOR) == "clusters":
        assert_weights_decide(kept, q, k, v, thresholds, **options)
    else:
        assert_sums_decide(kept, q, k, v, thresholds, **options)


def assert_sums_decide(
    kept: Tensor, q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **options: object
) -> None:
    """The map lies between those of a slightly lower and a slightly higher tau: the mass of a row just reaches it."""
    for entry in thresholds:
        assert entry.topk is None and entry.cdf < 1, "tiles differ, and no sum decides on them"
    lower, upper = (
        reference_stages(q, k, v, [replace(entry, cdf=entry.cdf + by) for entry in thresholds], **options).kept
        for by in (-TAU_ROUNDING, TAU_ROUNDING)
    )
    assert not (lower & ~kept).any() and not (kept & ~upper).any()


def assert_weights_decide(
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Sequence[Thresholds],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    predictor: str = "clusters",
) -> None:
    """The map is right for weights that differ from the specification's by no more than rounding may change them."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else additive_mask(attn_mask, torch.float32)
    wide = (x.float() for x in (q, k, v))
    known = predict.predict(*wide, is_causal=is_causal, scale=scale, mask=mask, predictor=predictor)
    error = weight_error(q, k, scale)
    for head, entry in enumerate(list(thresholds) * (q.shape[1] if len(thresholds) == 1 else 1)):
        candidates = known.whole[:, head] & (known.k_similarity[:, head, None] >= entry.similarity)
        candidates = candidates & ~known.q_similarity[:, head, :, None].isnan()
        visible = known.whole[:, head] | known.partial[:, head]
        assert torch.equal(kept[:, head] & ~candidates, visible & ~candidates), "kept without asking"
        rows = zip(*(x.flatten(0, 1) for x in (known.scores[:, head], candidates, kept[:, head])), strict=True)
        for weights, some, chosen in rows:
            _assert_choice(weights[some].double(), chosen[some], entry, error)


def weight_error(q: Tensor, k: Tensor, scale: float) -> float:
    """Most that the weights of clusters may err by, in nats: q and the means are rounded to bf16, 2^-9 each.

    A score then errs by at most 2^-8 |q| |k|, a share by that of two scores; .001 is of the exponentials. Rows whose
    scores are no numbers decide nothing.
    """
    q_norm, k_norm = (x.double().nan_to_num(0, 0, 0).norm(dim=-1) for x in (q, k))
    largest = [x[x <= HUGE * x.median()].amax() for x in (q_norm, k_norm)]
    return float(2**-7 * largest[0] * largest[1] * abs(scale)) + 1e-3


def _assert_choice(weights: Tensor, kept: Tensor, entry: Thresholds, error: float) -> None:
    """One query tile's candidates: weights in nats and what was kept of them, [n]."""
    if weights.isnan().any() or (entry.topk is None and entry.cdf >= 1):
        assert kept.all()
        return
    if len(weights) == 0:
        return
    least, most = (
        weights[kept].min() if kept.any() else torch.inf,
        weights[~kept].max() if not kept.all() else -torch.inf,
    )
    assert most <= least + 2 * error, "a tile was kept, and one of more weight was not"
    if entry.topk is not None:
        assert kept.sum() == max(1, math.ceil(Fraction(str(entry.topk)) * len(kept)))
        return
    dropped, spare = weights[~kept].exp().sum(), 1 - entry.cdf
    assert dropped <= spare * math.exp(error) + TAU_ROUNDING
    if kept.any():
        assert dropped + least.exp() >= spare * math.exp(-error) - TAU_ROUNDING, "one more could have been dropped"
