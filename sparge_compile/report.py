"""`Report` and `SiteReport`: what a compile found, what it did with each attention call, and why."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sparge_compile import dynamo
from sparge_compile.dynamo import Size
from sparge_compile.site import AttentionSite, Decision, Refusal


@dataclass(frozen=True)
class SiteReport:
    """One attention call.

    Attributes:
        name: the site's name.
        rewritten: does it run `sparge::attention`?
        reason: why it stayed dense; None if rewritten.
        q_len, k_len, heads, head_dim: sizes at compile time, None where the call does not show them; q_len and k_len
            are texts such as `s27` where they are dynamic.
        dtype: of the output, as `bfloat16`.
        is_causal: as computed, a recognised causal mask included.
        masked: a mask is given to the kernel, or to the dense call; one that is recognised as causal or open is not.
        thresholds: one mapping for all heads, or one per head; empty if dense.
        pattern: `sdpa`, `mha`, `softmax`, `opaque`, `not_attention`.
        source: `file:line` in user code.
        requested: dense because the user asked for it.
        threshold_source: who set the thresholds: `rule NAME` (rules.py), `policy`, `profile` or `attached profile`;
            None if dense. What is attached may change from call to call; `thresholds` then holds what `explain` ran
            with, else nothing.
        predictor: the one the thresholds belong to; None if dense.
        bucket: the lengths this variant was compiled for, as `1024 or more`; `at run time` where the operator decides.
        expected_density: what a profile measured, or `topk`; None where only a run can tell.
        variant: how many variants of the call's code torch had compiled with this one; it keeps
            torch.compiler.config.recompile_limit of them.
        density: share of the visible tiles that were computed, from `explain`'s run; None if not measured.
        pv_skipped: share of the computed tiles whose P V product was skipped; None if not measured.
    """

    name: str
    rewritten: bool
    reason: str | None
    q_len: int | str | None = None
    k_len: int | str | None = None
    heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    is_causal: bool | None = None
    masked: bool | None = None
    thresholds: tuple[dict[str, float | None], ...] = ()
    pattern: str = "sdpa"
    source: str = ""
    requested: bool = False
    density: float | None = None
    pv_skipped: float | None = None
    threshold_source: str | None = None
    predictor: str | None = None
    bucket: str | None = None
    expected_density: float | None = None
    variant: int | None = None


@dataclass(frozen=True)
class Report:
    """Every attention call of a compile: `print(report)` is a table, `report.to_json()` the same as JSON."""

    sites: tuple[SiteReport, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        """Sites that run `sparge::attention`."""
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def dense(self) -> tuple[SiteReport, ...]:
        """Sites that kept their original call."""
        return tuple(site for site in self.sites if not site.rewritten)

    def to_json(self) -> str:
        """The report as a JSON object with the keys `sites` and `notes`."""
        return json.dumps({"sites": [asdict(site) for site in self.sites], "notes": list(self.notes)}, indent=1)

    def __str__(self) -> str:
        lines = [f"{len(self.rewritten)} of {len(self.sites)} attention calls rewritten"]
        if self.sites:
            lines += _table([_HEADER, *(_row(site) for site in self.sites)])
        lines += [f"{site.name}: {site.reason}" for site in self.dense]
        return "\n".join([*lines, *_recompiles(self.sites), *self.notes])


_HEADER = ("site", "rewritten", "queries x keys", "heads x dim", "dtype", "mask", "thresholds", "density", "pattern")


def _row(site: SiteReport) -> tuple[str, ...]:
    return (
        site.name,
        "yes" if site.rewritten else "no",
        f"{_shown(site.q_len)} x {_shown(site.k_len)}",
        f"{_shown(site.heads)} x {_shown(site.head_dim)}",
        _shown(site.dtype),
        "causal" if site.is_causal else ("given" if site.masked else "-"),
        _shown(site.threshold_source),
        _density(site),
        site.pattern,
    )


def _density(site: SiteReport) -> str:
    """What a run measured, else what is expected of it."""
    if site.density is not None:
        return f"{site.density:.3f}"
    return "-" if site.expected_density is None else f"~{site.expected_density:.3f}"


def _recompiles(sites: Sequence[SiteReport]) -> list[str]:
    """A line for each number of variants beyond the first."""
    numbers = sorted({site.variant for site in sites if site.variant is not None and site.variant > 1})
    limit = dynamo.recompile_limit()
    return [
        f"compiled {number} times (torch keeps {limit} variants, then runs eagerly): "
        + ", ".join(site.name for site in sites if site.variant == number)
        for number in numbers
    ]


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


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


class _LastReport:
    """The graphs of the most recent `torch.compile`, kept apart by the callable that it made.

    Dynamo calls the backend once per graph and once more per variant; a site compiled again replaces its line.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: weakref.ref[Any] | None = None
        self._report = Report()

    def add(self, owner: object | None, sites: Iterable[SiteReport]) -> None:
        with self._lock:
            same = owner is not None and self._owner is not None and self._owner() is owner
            before = self._report.sites if same else ()
            merged = {(site.name, site.source): site for site in (*before, *sites)}
            self._report = replace(self._report, sites=tuple(merged.values()))
            self._owner = None if owner is None else weakref.ref(owner)

    def get(self) -> Report:
        with self._lock:
            return self._report


LAST = _LastReport()


def last_report() -> Report:
    """What the most recent `torch.compile(..., backend="sparge")` that compiled anything found and did.

    Covers every graph of that compile (a model with graph breaks has several). Empty before the first.
    """
    return LAST.get()
