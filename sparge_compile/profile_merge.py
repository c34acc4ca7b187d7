"""Which of two profiles' entries is the more careful one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from sparge_compile.profile_data import Measurement, Origin, ProfileError
from sparge_kernels.thresholds import PV_DROP_BUDGET, Thresholds

_Entry = TypeVar("_Entry")
_LOWEST_CERTIFICATE = math.log(PV_DROP_BUDGET / 2**31)  # what pv=None is for more keys than anyone has


def more_careful(
    site: str, one: Thresholds, other: Thresholds, of_one: Measurement | None, of_other: Measurement | None
) -> Thresholds:
    """Thresholds that keep what either keeps: the larger topk, cdf and similarity, the lower pv.

    topk replaces cdf, so the two do not compare: then the entry measured to be denser is taken whole. pv=None, the
    certificate, is lower than any number that is above what it stands for at 2^31 keys.

    Raises:
        ProfileError: topk and cdf meet, and nothing says which keeps more.
    """
    if (one.topk is None) == (other.topk is None):
        return Thresholds(
            None if one.topk is None or other.topk is None else max(one.topk, other.topk),
            max(one.cdf, other.cdf),
            max(one.similarity, other.similarity),
            min(one.pv, other.pv, key=lambda pv: _LOWEST_CERTIFICATE if pv is None else pv),
        )
    for entry in (one, other):
        if entry.topk == 1:
            return entry
    if of_one is None or of_other is None:
        raise ProfileError(
            f"site {site!r}: one profile sets topk, the other cdf_threshold, and without measured densities nothing "
            "says which keeps more. Calibrate both, or give both the same kind of threshold."
        )
    return one if of_one.density >= of_other.density else other


def worse(one: Measurement, other: Measurement) -> Measurement:
    """The larger error and density, the smaller cosine."""
    return Measurement(
        max(one.error, other.error), min(one.worst_row, other.worst_row), max(one.density, other.density)
    )


def paired(site: str, one: Sequence[_Entry], other: Sequence[_Entry]) -> list[tuple[_Entry, _Entry]]:
    """Heads side by side; one entry for all heads stands beside each of the other's."""
    count = max(len(one), len(other))
    if not {len(one), len(other)} <= {1, count}:
        raise ProfileError(f"site {site!r} has {len(one)} heads in one profile and {len(other)} in the other.")
    left, right = (list(entries) * (count if len(entries) == 1 else 1) for entries in (one, other))
    return list(zip(left, right, strict=True))


def merge_origins(one: Origin, other: Origin) -> Origin:
    """What is known of either; every device and version; the looser of two bounds."""
    if one.model is not None and other.model is not None and one.model != other.model:
        raise ProfileError(
            f"cannot merge profiles of different models: {one.model.name} (parameters {one.model.parameters}) and "
            f"{other.model.name} (parameters {other.model.parameters})."
        )
    texts = {name: _joined(getattr(one, name), getattr(other, name)) for name in ("device", "sparge_compile", "torch")}
    errors = [x for x in (one.max_error, other.max_error) if x is not None]
    cosines = [x for x in (one.min_row_cosine, other.min_row_cosine) if x is not None]
    return Origin(
        one.model or other.model,
        **texts,
        max_error=max(errors, default=None),
        min_row_cosine=min(cosines, default=None),
    )


def _joined(one: str | None, other: str | None) -> str | None:
    parts = sorted({part for text in (one, other) if text for part in text.split(", ")})
    return ", ".join(parts) or None
