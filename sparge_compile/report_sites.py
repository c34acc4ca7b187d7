"""From what was decided about a site to its line of a report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from sparge_compile import dynamo
from sparge_compile.dynamo import Size
from sparge_compile.report import SiteReport
from sparge_compile.site import AttentionSite, Decision, Refusal


def describe(site: AttentionSite, outcome: Decision | Refusal, variant: int | None = None) -> SiteReport:
    """The report line of one decided site; `variant`: as in `SiteReport`."""
    sizes = _sizes(site)
    output = dynamo.example(site.node) if site.output is None else dynamo.example(site.output.node)
    common = {
        "name": site.name,
        "pattern": site.pattern,
        "source": site.source,
        "variant": variant,
        "dtype": str(output.dtype).removeprefix("torch.") if isinstance(output, torch.Tensor) else None,
        **sizes,
    }
    if isinstance(outcome, Refusal):
        is_causal = site.is_causal if site.pattern == "sdpa" and isinstance(site.is_causal, bool) else None
        return SiteReport(
            rewritten=False,
            reason=outcome.reason,
            requested=outcome.requested,
            is_causal=is_causal,
            masked=None if site.query is None else bool(site.masks),
            **common,
        )
    thresholds = tuple(asdict(entry) for entry in outcome.thresholds)
    return SiteReport(
        rewritten=True,
        reason=None,
        is_causal=outcome.claim.is_causal,
        masked=bool(outcome.claim.masks),
        thresholds=thresholds,
        threshold_source=outcome.source,
        predictor=outcome.predictor,
        bucket=outcome.bucket,
        expected_density=outcome.expected_density,
        **common,
    )


def _sizes(site: AttentionSite) -> dict[str, Any]:
    if site.query is None or site.key is None:
        return {}
    _, heads, q_len, head_dim = site.query.shape
    return {
        "q_len": _length(q_len),
        "k_len": _length(site.key.shape[2]),
        "heads": dynamo.hint(heads),
        "head_dim": dynamo.hint(head_dim),
    }


def _length(size: Size) -> int | str:
    return size if isinstance(size, int) else str(size)
