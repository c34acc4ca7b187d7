"""Dense attention in which each query meets only the keys it may attend to: a hidden NaN or inf spoils nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from sparge_compile.testing.inputs import AttentionInputs


def dense_over_visible_keys(inputs: AttentionInputs, value: Tensor) -> Tensor:
    """Attention in fp64 over `value`, [batch, q_heads, q_len, value_head_dim]; queries that see no key give 0.

    Plain dense attention multiplies what a mask hides by 0, and 0 times NaN or inf is NaN.
    """
    group = inputs.q_heads // inputs.kv_heads
    key, value = (x.double().repeat_interleave(group, 1) for x in (inputs.key, value))
    scale = inputs.head_dim**-0.5 if inputs.scale is None else inputs.scale
    scores = inputs.query.double() @ key.mT * scale
    mask = inputs.attn_mask
    if mask is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        visible = visible.tril() if inputs.is_causal else visible
    elif mask.dtype == torch.bool:
        visible = mask
    else:
        visible, scores = mask > -torch.inf, scores + mask.double()
    visible = visible.expand_as(scores)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return _weighted(weights, visible, value)


def _weighted(weights: Tensor, visible: Tensor, value: Tensor) -> Tensor:
    """weights @ value, in which a number that is not visible does not take part."""
    out = weights @ value.masked_fill(~value.isfinite(), 0.0)
    positive = _any(weights > 0, value == torch.inf)
    negative = _any(weights > 0, value == -torch.inf)
    nan = _any(visible, value.isnan()) | _any(visible & (weights == 0), value.isinf()) | (positive & negative)
    return out.masked_fill(positive, torch.inf).masked_fill(negative, -torch.inf).masked_fill(nan, torch.nan)


def _any(rows: Tensor, columns: Tensor) -> Tensor:
    """Boolean matrix product: is there a key of which both hold?"""
    return rows.double() @ columns.double() > 0
